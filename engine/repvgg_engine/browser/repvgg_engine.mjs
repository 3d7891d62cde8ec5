// The native engine in a browser, or in Node: RepVGG in deploy form, by Winograd's algorithms, on one thread of WebAssembly.
//
//   const net = await load(engine, model, plan);      // bytes of the file ENGINE and of a .safetensors file; a plan's text, or null
//   const [best] = net.classify(imageData);           // of a canvas: resized, cropped and normalised as the model says
//   const logits = net.run(floats, n, height, width); // Float32Array [n, channels, height, width]

// A function that multiplies and adds vectors at once, which is valid where WebAssembly has relaxed SIMD.
const RELAXED = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 20, 1, 18, 0,
  65, 0, 253, 15, 65, 0, 253, 15, 65, 0, 253, 15, 253, 133, 2, 26, 11,
];
export const ENGINE = WebAssembly.validate(new Uint8Array(RELAXED)) ? 'repvgg_engine.relaxed.wasm' : 'repvgg_engine.wasm';

export async function load(engine, model, plan = null) {
  const {instance} = await WebAssembly.instantiate(engine, imports(() => wasm));
  const wasm = instance.exports;
  wasm._initialize();
  const bytes = new Uint8Array(model), words = plan === null ? null : new TextEncoder().encode(`${plan}\0`);
  const net = lending(wasm, words ? [bytes, words] : [bytes], (from, by = 0) => wasm.open(from, bytes.length, by));
  const [channels, height, width, outputs, names] = new Int32Array(wasm.memory.buffer, wasm.about(net), 5);
  const classes = names ? Array.from(new Uint32Array(wasm.memory.buffer, names, outputs), at => text(wasm, at)) : null;
  const logitsOf = (output, count) => {
    const logits = new Float32Array(wasm.memory.buffer, output, count).slice();
    wasm.release(output);
    return logits;
  };
  return {
    channels, height, width, classes,
    run(images, n = 1, rows = height, columns = width) {
      const wanted = count(n, channels, rows, columns);
      if (!(images instanceof Float32Array) || images.length !== wanted)
        throw new Error(`images are a Float32Array of ${wanted} numbers: ${[n, channels, rows, columns].join(' x ')}`);
      const data = new Uint8Array(images.buffer, images.byteOffset, images.byteLength);
      return logitsOf(lending(wasm, [data], room => wasm.run(net, room, n, rows, columns)), n * outputs);
    },
    logits({data, height: rows, width: columns}) {
      const wanted = count(4, rows, columns);
      if (!(data instanceof Uint8ClampedArray || data instanceof Uint8Array) || data.length !== wanted)
        throw new Error(`an image's data are a Uint8ClampedArray or Uint8Array of ${wanted} bytes: RGBA, ${rows} x ${columns}`);
      return logitsOf(lending(wasm, [data], room => wasm.classify(net, room, rows, columns)), outputs);
    },
    classify(image, top = 5) {
      const logits = this.logits(image), largest = Math.max(...logits), powers = Array.from(logits, x => Math.exp(x - largest));
      const sum = powers.reduce((a, b) => a + b, 0);
      return powers.map((p, i) => ({label: classes ? classes[i] : String(i), probability: p / sum}))
        .sort((a, b) => b.probability - a.probability).slice(0, top);
    },
    close: () => wasm.close(net),
  };
}

// What the engine asks of its host: words for what it refuses, and a clock. It opens no files.
function imports(wasm) {
  const clock = (id, precision, at) => {
    new DataView(wasm().memory.buffer).setBigInt64(at, BigInt(Math.round(1e6 * performance.now())), true);
    return 0;
  };
  const system = new Proxy({clock_time_get: clock}, {get: (known, name) => known[name] ?? (() => { throw new Error('the engine failed: not enough memory?'); })});
  return {env: {refuse: at => { throw new Error(text(wasm(), at)); }}, wasi_snapshot_preview1: system};
}

function count(...sizes) {
  if (!sizes.every(size => Number.isInteger(size) && size > 0)) throw new Error(`sizes are whole numbers from 1 on, not ${sizes.join(', ')}`);
  return sizes.reduce((a, b) => a * b);
}

// Puts bytes in the engine's memory for a call. What is refused leaves the engine in the middle of its functions: its stack is put back.
function lending(wasm, arrays, call) {
  const stack = wasm.__stack_pointer.value, rooms = [];
  try {
    for (const bytes of arrays) rooms.push(put(wasm, bytes));
    return call(...rooms);
  } catch (problem) {
    wasm.__stack_pointer.value = stack;
    throw problem;
  } finally {
    for (const room of rooms) wasm.release(room);
  }
}

function put(wasm, bytes) {
  const room = wasm.room(bytes.length);
  if (!room) throw new Error('there is not enough memory');
  new Uint8Array(wasm.memory.buffer, room, bytes.length).set(bytes);
  return room;
}

function text(wasm, at) {
  const bytes = new Uint8Array(wasm.memory.buffer, at);
  return new TextDecoder().decode(bytes.subarray(0, bytes.indexOf(0)));
}
