"""Every verb of the command line as a function: train, evaluate, predict, export, quantize, prune.

    run = repvgg.train("repvgg_a0", "photos", "runs/photos", epochs=20)
    repvgg.evaluate(run.model, "photos").per_class
    repvgg.predict("runs/photos", "cat.jpg")[0].labels
    repvgg.export("runs/photos", "onnx", "exported")[0].path

`model` is a module of ours, a model file, a run folder, hf:USER/NAME, or a name for its pretrained weights; `data`
is a string as for `repvgg train --data`, or a `Source`. The command line calls these functions and prints what they return.
"""
