// The native engine as WebAssembly beside onnxruntime-web, one thread each, in turns; writes results/wasm.json.
//
//   npm install --prefix /tmp/ort onnxruntime-web
//   repvgg export a0.safetensors --to web --out site && repvgg export a0.safetensors --to onnx --out site
//   node results/measure_wasm.mjs site /tmp/ort [ROUNDS]      # Node 20 has relaxed SIMD with --experimental-wasm-relaxed-simd
import {spawnSync} from 'node:child_process';
import {createRequire} from 'node:module';
import {readFileSync, readdirSync, writeFileSync} from 'node:fs';
import {cpus, loadavg, release, type} from 'node:os';
import {join, resolve} from 'node:path';
import {fileURLToPath, pathToFileURL} from 'node:url';

const [site, runtime, rounds = '15'] = process.argv.slice(2);
if (!runtime || !(Number(rounds) >= 1)) {
  console.error('usage: node results/measure_wasm.mjs SITE RUNTIME [ROUNDS]   (SITE: of repvgg export --to web and --to onnx; RUNTIME: where npm put onnxruntime-web)');
  process.exit(2);
}
const WARMUP = 3, WANTED = 2.3;
const load_before = loadavg()[0];
const here = name => readFileSync(join(site, name));
const require = createRequire(join(resolve(runtime), 'node_modules', 'x.js'));
const ort = await import(pathToFileURL(require.resolve('onnxruntime-web')));
const version = JSON.parse(readFileSync(join(runtime, 'node_modules/onnxruntime-web/package.json'))).version;
ort.env.wasm.numThreads = 1;

const {ENGINE, load} = await import(pathToFileURL(resolve(site, 'repvgg_engine.mjs')));
const engine = async name => load(here(name), here('model.safetensors'), here('plan.json').toString());
const native = await engine(ENGINE), plain = await engine('repvgg_engine.wasm');
const files = readdirSync(site).filter(name => /^repvgg_engine.*\.wasm$/.test(name));
const onnx = readdirSync(site).find(name => name.endsWith('.onnx'));
const session = await ort.InferenceSession.create(here(onnx), {executionProviders: ['wasm']});

const shape = [1, native.channels, native.height, native.width], images = new Float32Array(shape.reduce((a, b) => a * b));
let seed = 1;
for (let i = 0; i < images.length; i++) images[i] = ((seed = (seed * 1103515245 + 12345) % 2 ** 31) / 2 ** 31 - 0.5) * 3;
const tensor = new ort.Tensor('float32', images, shape);
const run = {
  native: async () => native.run(images),
  'native, no relaxed SIMD': async () => plain.run(images),
  'onnxruntime-web': async () => Object.values(await session.run({[session.inputNames[0]]: tensor}))[0].data,
};

const logits = {}, times = Object.fromEntries(Object.keys(run).map(name => [name, []]));
for (const [name, call] of Object.entries(run)) for (let i = 0; i < WARMUP; i++) logits[name] = await call();
for (let round = 0; round < Number(rounds); round++)
  for (const name of round % 2 ? Object.keys(run).reverse() : Object.keys(run)) {
    const started = performance.now();
    await run[name]();
    times[name].push(performance.now() - started);
  }

const sorted = numbers => [...numbers].sort((a, b) => a - b), median = numbers => sorted(numbers)[numbers.length >> 1];
const best = values => values.indexOf(Math.max(...values));
const largest = Math.max(...logits.native.map(Math.abs));
const apart = Math.max(...logits.native.map((x, i) => Math.abs(x - logits['onnxruntime-web'][i]))) / largest;
const over = name => {
  const ratios = sorted(times[name].map((ms, i) => times['onnxruntime-web'][i] / ms)), at = share => ratios[Math.floor(share * (ratios.length - 1))];
  return {median: median(ratios), low: at(0.05), high: at(0.95)};
};
const git = (...words) => spawnSync('git', ['-C', fileURLToPath(new URL('.', import.meta.url)), ...words]).stdout?.toString().trim();
const head = git('rev-parse', '--short', 'HEAD');  // of this script and, if it was exported from here, of the engine
const machine = {
  processor: cpus()[0].model, cores: cpus().length, threads: 1, system: `${type()} ${release()}`,
  versions: {node: process.versions.node, 'onnxruntime-web': version},
  commit: head ? head + (git('status', '--porcelain', '-uno') ? '+' : '') : null,
  date: new Date().toISOString(), load_before,
};
const record = {
  about: 'milliseconds an image, batch 1, one thread each, in turns; ratio: of onnxruntime-web over native, round by round',
  target: WANTED, machine,
  rounds: Number(rounds), median_ms: Object.fromEntries(Object.entries(times).map(([name, of]) => [name, median(of)])), times_ms: times,
  engine: ENGINE, ratio: over('native'), ratio_without_relaxed_simd: over('native, no relaxed SIMD'),
  same_class: best(Array.from(logits.native)) === best(Array.from(logits['onnxruntime-web'])), largest_difference: apart,
  bytes: Object.fromEntries(files.map(name => [name, here(name).length])),
};
writeFileSync(new URL('wasm.json', import.meta.url), `${JSON.stringify(record, null, 1)}\n`);
console.log(`native ${record.median_ms.native.toFixed(1)} ms, onnxruntime-web ${record.median_ms['onnxruntime-web'].toFixed(1)} ms: ` +
  `${record.ratio.median.toFixed(2)} times (${record.ratio.low.toFixed(2)} to ${record.ratio.high.toFixed(2)}); ` +
  `${record.same_class ? 'the same class' : 'ANOTHER CLASS'}, logits differ by ${apart.toExponential(1)} of the largest`);
