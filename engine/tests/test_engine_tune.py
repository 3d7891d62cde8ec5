"""The choice of algorithms: within its budgets, remembered, cheap, and never wrong about a net."""

import io
import json
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from nets import PREPROCESSING, conv, images, model_file, plain_net
from repvgg_engine import Net, Plan, load, loader, plan, plans, reference, speed, tune
from repvgg_engine.costs import estimated_cost, macs
from repvgg_engine.layers import Array, Layer, Pool
from repvgg_engine.machine import available_threads
from repvgg_engine.tune import Option, choose


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_fastest_within_the_budgets() -> None:
    def squares(*values: float) -> tune.Squares:
        return np.array(values, np.float64)

    layer = [Option("direct", 9, squares(0, 0), 1), Option("F2", 5, squares(1, 0.5), 2), Option("F4", 3, squares(10, 2), 4)]
    assert choose([layer, [], layer], squares(0, 0), memory=100) == ["direct", "", "direct"]
    assert choose([layer, [], layer], squares(2, 2), memory=100) == ["F2", "", "F2"]
    assert sorted(choose([layer, layer], squares(11, 11), memory=100)) == ["F2", "F4"]
    assert choose([layer, layer], squares(20, 20), memory=100) == ["F4", "F4"]
    assert choose([layer, layer], squares(20, 1), memory=100) == ["F2", "F2"]  # each kind of images has its own budget
    assert choose([layer, layer], squares(20, 20), memory=5) == ["F2", "F2"]
    assert choose([layer, layer], squares(20, 20), memory=2) == ["direct", "direct"]
    better = [Option("direct", 9, squares(0, 0), 8), Option("F2", 5, squares(-1, -1), 2)]
    assert choose([better], squares(0, 0), memory=100) == ["F2"]


@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_the_error_stays_within_its_budget(tmp_path: Path, accuracy: str) -> None:
    net = load(model_file(tmp_path / "net.safetensors", plain_net()), accuracy=accuracy)
    exact = load(tmp_path / "net.safetensors", accuracy="exact")
    for n in (1, 4):
        x = tune.calibration_images(net)
        wanted = reference.run(net.layers, x)
        got = np.concatenate([net(x[i : i + n]) for i in range(0, len(x), n)])
        limit = tune.TIMES_DIRECT["fp32", accuracy] * reference.error(exact(x), wanted)
        assert reference.error(got, wanted) <= max(limit, tune.FAST if accuracy == "fast" else 0)


@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("dead", [1, 7])  # a layer whose ReLU leaves nothing, a head of zeros
def test_an_output_that_is_the_same_for_every_image(dead: int, accuracy: str) -> None:
    """It is judged by its size. Warnings fail the test."""
    layers: list[Any] = plain_net()
    layer = layers[dead]
    layers[dead] = replace(layer, weight=0 * layer.weight, bias=layer.bias - (100 if layer.relu else 0))
    net, x = loader.build(layers, PREPROCESSING, accuracy=accuracy), images(2)
    wanted = reference.run(layers, x)
    assert np.ptp(wanted, 0).max() < 1e-12
    assert reference.error(net(x), wanted) < 1e-5
    assert reference.error(2 * net(x), wanted) > 0.9
    assert reference.error(0 * x, np.zeros(x.shape)) == 0


def deep_net(layers: int = 12, channels: int = 64) -> list[Any]:
    random = np.random.default_rng(0)
    body = [conv(random, channels, channels, padding=(1, 1), relu=True) for _ in range(layers)]
    return [conv(random, 3, channels, padding=(1, 1), stride=(2, 2), relu=True), *body]


def test_one_layer_of_each_kind_is_timed() -> None:
    net = Net(deep_net())
    contenders = [speed.worth_timing(net, i, size, 1 << 30) for i, size in enumerate(speed.sizes_of_layers(net.layers, (64, 64)))]
    kept, kind = speed.one_of_each(net, contenders)
    assert len(kept) == 2
    assert kind == [0] + [1] * 12
    assert kept == net.layers[:2]
    assert all(names[0] == "direct" for names in contenders)
    assert {"F4", "F5"} & set(contenders[1])


def test_little_is_computed_before_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever size of input a file names, and however many layers it has."""
    path, computed = tmp_path / "net.safetensors", list[int]()
    run = Net.run

    def counted(net: Net, x: np.ndarray) -> np.ndarray:
        computed.append(len(x) * macs(net.layers, (x.shape[2], x.shape[3])))
        return run(net, x)

    monkeypatch.setattr(Net, "run", counted)
    for side in (32, 8192):
        given = {"input_size": [3, side, side], "resize": side, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [1] * 3}
        load(model_file(path, deep_net(), preprocessing=given), threads=2).prepare()
        assert 0 < max(computed) <= speed.MANY * speed.MOST_TIMED_MACS
        assert sum(computed) < 6e11  # some seconds
        computed.clear()


@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_without_time_the_guess_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: str) -> None:
    """One algorithm of each layer is timed, no layer is watched, one check of the whole net is made: it is within the budget."""
    path, runs = model_file(tmp_path / "net.safetensors", deep_net(channels=32)), list[int]()
    run = Net.run

    def counted(net: Net, x: np.ndarray) -> np.ndarray:
        runs.append(len(x))
        return run(net, x)

    monkeypatch.setattr(Net, "run", counted)
    monkeypatch.setattr(speed, "SECONDS", 0)
    monkeypatch.setattr(tune, "SECONDS", 0)
    net = load(path, accuracy=accuracy)
    net.prepare()
    assert len(runs) == speed.REPEATS_OF_ONE + speed.REPEATS + 2 * 2  # the last: direct, and the choice, on two kinds of images
    assert {"F2", "F4", "F5", "F6", "F7"} & set(net.chosen)
    x = tune.calibration_images(net)
    wanted, exact = reference.run(net.layers, x), load(path, accuracy="exact")
    limit = tune.TIMES_DIRECT["fp32", accuracy] * reference.error(exact(x), wanted)
    assert reference.error(net(x), wanted) <= max(limit, tune.FAST if accuracy == "fast" else 0)


def test_tiles_where_no_check_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen then cannot leave the budget, and is no direct algorithm where tiles pay."""
    monkeypatch.setattr(tune, "MOST_CHECKS", 0)
    monkeypatch.setattr(tune, "MOST_PUT_RIGHT", 0)
    for precision in ("fp32", "int16"):
        net = load(model_file(tmp_path / "net.safetensors", deep_net()), precision=precision)
        net.prepare()
        tiles = [name.split()[0] for name in net.chosen if name and not name.startswith("direct")]
        assert tiles
        assert precision != "fp32" or set(tiles) == {"F2"}


def test_what_there_was_no_time_for_counts_as_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0)
    net = Net(deep_net())
    of_layer = speed.measure_speed(net, 1 << 30)[6]
    assert of_layer.keys() == set(speed.worth_timing(net, 6, speed.sizes_of_layers(net.layers, (224, 224))[6], 1 << 30))
    best = min(of_layer, key=lambda name: of_layer[name])
    guesses = {name: estimated_cost(net.layers[6], (112, 112), name, 1, net.isa) for name in of_layer}  # type: ignore[arg-type]
    assert best != "direct"
    assert of_layer["direct"] / of_layer[best] == pytest.approx(guesses["direct"] / guesses[best], rel=0.2)


def test_choices_are_remembered(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    first = load(path)(images())
    (cached,) = folder.glob("*.json")
    assert len(json.loads(cached.read_text())["algorithms"]) == len(plain_net())
    monkeypatch.setattr(tune, "choose_algorithms", None)  # would fail if it were called
    assert np.array_equal(load(path)(images()), first)


def test_speed_is_measured_once_for_all_accuracies(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    wanted = load(path)(images())
    (speeds,) = folder.glob("*.speeds")
    measure = speed.measure_speed
    monkeypatch.setattr(speed, "measure_speed", None)  # would fail if it were called
    assert np.allclose(load(path, accuracy="fast")(images()), wanted, atol=1e-3)
    times = [dict.fromkeys(names, 1.0) for names in load(path).known]
    damaged = [json.dumps([dict.fromkeys(of_layer, bad) for of_layer in times]) for bad in (math.nan, math.inf, -1.0, 10**400)]
    for text in ("", "[]", "{}", "[[]]", *damaged, '[{"F3": 1}]', "[" * 100_000):
        speeds.write_text(text)
        for plan_file in folder.glob("*.json"):
            plan_file.unlink()
        with pytest.raises(TypeError):
            load(path)(images())
    monkeypatch.setattr(speed, "measure_speed", measure)
    assert np.allclose(load(path)(images()), wanted, atol=1e-4)
    assert len(json.loads(speeds.read_text())) == len(plain_net())


def test_progress_is_one_line_of_a_terminal(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    load(path, accuracy="fast").prepare()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(path).prepare()
    said = capsys.readouterr().err
    assert "\n" not in said
    assert "checking the whole net" in said
    assert said.endswith("\r\033[K")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"repvgg_engine_plan": 1, "isa": "x", "precision": "", "algorithms": ["F4"]}']
)
def test_a_cache_that_does_not_fit_is_measured_again(tmp_path: Path, folder: Path, content: str) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    wanted = load(path)(images())
    (cached,) = folder.glob("*.json")
    cached.write_text(content)
    assert np.allclose(load(path)(images()), wanted, atol=1e-4)
    assert len(plans.read(cached).algorithms) == len(plain_net())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "file" / "folder"))
    assert load(model_file(tmp_path / "net.safetensors", plain_net()))(images()).shape == (4, 10)


def test_without_a_home(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are kept where they are told to be, or nowhere."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(speed, "SECONDS", 0)
    path = model_file(tmp_path / "net.safetensors", plain_net())
    load(path).prepare()
    assert list(folder.glob("*.json"))
    monkeypatch.delenv("REPVGG_ENGINE_CACHE")
    load(path).prepare()


@pytest.mark.parametrize("closed", [True, False])
def test_without_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if closed else None)
    monkeypatch.setattr(speed, "SECONDS", 0)
    load(model_file(tmp_path / "net.safetensors", plain_net())).prepare()


def test_images_are_not_shrunk_below_what_the_last_layer_takes() -> None:
    """A net may end in a convolution without padding."""
    random = np.random.default_rng(0)
    layers: list[Layer] = [conv(random, 3, 4, stride=(2, 2), padding=(1, 1))]
    layers += [conv(random, 4, 4, stride=(2, 2), padding=(1, 1)) for _ in range(4)]
    layers.append(conv(random, 4, 2, kernel=7))
    size = speed.shrunk(layers, (256, 256), most_macs=0)
    assert reference.run(layers, np.zeros((1, 3, *size), np.float32)).shape[2:] == (2, 2)
    assert size == (256, 256)


@pytest.mark.parametrize("size", [[3, 8192, 8192], [3, 8192, 16]])
def test_a_small_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: list[int]) -> None:
    """Whatever size of input it names."""
    random, seen = np.random.default_rng(0), list[int]()
    layers: list[Layer] = [conv(random, 3, 1, kernel=1), conv(random, 1, 64, kernel=1), Pool(64), conv(random, 64, 2, kernel=1)]
    given = {"input_size": size, "resize": 8192, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [1] * 3}
    path = model_file(tmp_path / "net.safetensors", layers, preprocessing=given)
    run = Net.run

    def watched(net: Net, images: Array) -> Array:
        seen.append(64 * images[0, 0].size)
        return run(net, images)

    monkeypatch.setattr(speed, "MOST_NUMBERS", 1 << 16)  # quicker
    monkeypatch.setattr(Net, "run", watched)
    monkeypatch.setattr(speed, "SECONDS", 0)
    monkeypatch.setattr(tune, "SECONDS", 0)
    net = load(path)
    assert tune.calibration_images(net)[0, 0].size * 64 <= speed.MOST_NUMBERS
    net.prepare()
    assert 0 < max(seen) <= speed.MOST_NUMBERS


def test_the_time_limit_is_of_the_processors_that_there_are() -> None:
    """More threads than those take no longer."""
    assert speed.Clock(1, 1000).threads == available_threads()
    assert speed.Clock(1, 1).threads == 1


def test_a_kept_plan_stays_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made for no more memory than any machine has that finds it, and for not much less."""
    net, limits = load(model_file(tmp_path / "net.safetensors", plain_net())), list[int]()
    monkeypatch.setattr(speed, "measure_speed", lambda net, limit, say: limits.append(limit))
    monkeypatch.setattr(tune, "choose_algorithms", lambda *words: [names[0] if names else "" for names in net.known])
    for memory in range(220 << 20, 100 << 20, -4 << 20):
        monkeypatch.setattr(loader, "available_memory", lambda memory=memory: memory)
        loader._planned(net, "high", None)
        assert 0.8 * memory / 8 < limits[-1] <= memory / 8
    assert 3 < len(limits) < 8  # others were found


def test_the_memory_limit_is_kept(tmp_path: Path) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    exact = load(path, accuracy="exact")
    least = sum(exact.weight_bytes(i, "direct") for i in range(len(exact.layers)))
    net = load(path, memory_limit=least)
    wanted = exact(images())
    assert np.allclose(net(images()), wanted, atol=1e-4)
    assert sum(net.weight_bytes(i, name) for i, name in enumerate(net.chosen) if name) <= least
    assert plan(path, memory_limit=least).algorithms == tuple(net.chosen)


def test_no_weights_are_watched_that_take_more_than_half_of_the_limit(tmp_path: Path) -> None:
    net, largest = Net(deep_net(layers=3)), list[int]()
    choose = net.choose

    def watched(layer: int, algorithm: str) -> None:
        largest.append(net.weight_bytes(layer, algorithm))
        choose(layer, algorithm)

    net.choose = watched  # type: ignore[method-assign]
    least = net.weight_bytes(1, "direct")
    for limit in (1 << 30, 8 * least):
        largest.clear()
        shares = [dict.fromkeys(speed.worth_timing(net, i, (64, 64), limit), 1.0) for i in range(len(net.layers))]
        errors = tune._Errors(net, tune.calibration_images(net), "high", limit)
        errors.added(shares, speed.Clock(60, 1), speed.silent)
        assert max(largest) == net.weight_bytes(1, "F5" if limit == 1 << 30 else "direct")


def test_the_time_limit_holds_where_threads_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no time of the processors then."""
    monkeypatch.setattr("repvgg_engine.speed.time.process_time", lambda: 0.0)
    now = [100.0]
    monkeypatch.setattr("repvgg_engine.speed.time.monotonic", lambda: now[0])
    clock = speed.Clock(2, 1)
    assert clock.has()
    now[0] += 2 * speed.WALL_TIMES - 0.1
    assert clock.has()
    now[0] += 0.2
    assert not clock.has()


def test_threads_that_keep_a_plan_at_once_write_files_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, names, replace = threading.Barrier(2, timeout=30), list[Path](), Path.replace

    def renamed(path: Path, target: Path) -> Path:
        names.append(path)
        both.wait()  # until the other has written too
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", renamed)
    plans_ = [Plan("portable", "fp32", (name,)) for name in ("F2", "F4" * 1000)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda plan: plans.keep("key", plan), plans_))
    assert len(set(names)) == 2
    assert plans.cached("key") in plans_
