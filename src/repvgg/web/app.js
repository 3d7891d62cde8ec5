// Both forms of a network on the visitor's image: prepared as `repvgg predict` prepares it, timed in turns, compared.
// The deploy form runs in the native engine too, where the page was made with it: a switch shows the one or the other.
import * as ort from './ort.wasm.min.mjs';

const TOP = 5, WARMUP = 3, ROUNDS = 9;
const TURN = 30, BUDGET = 4000;  // milliseconds: of a turn at least, and of all turns about
const FORMS = ['training', 'deploy'];
const LARGEST = 100e6;  // pixels
const $ = (selector, inside = document) => inside.querySelector(selector);

ort.env.wasm.wasmPaths = new URL('./', location.href).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;

// ------------------------------------------------------------------------------------------------------------- preparing an image

const FILTERS = {  // [reach, weight at a distance]
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, x => {
    const a = -0.5;
    x = Math.abs(x);
    return x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  }],
};

// For each of `size` new samples the first old one and the weights from there on, antialiased; and the bits of those weights, which
// are whole numbers of 16 bits, as in PyTorch and Pillow.
function resampling(before, size, mode) {
  const scale = before / size;
  if (mode === 'nearest') return {taps: Array.from({length: size}, (_, i) => [Math.floor(i * scale), [1]]), bits: 0};
  const [reach, weight] = FILTERS[mode], spread = Math.max(1, scale);
  const exact = Array.from({length: size}, (_, i) => {
    const centre = scale * (i + 0.5);
    const first = Math.max(0, Math.trunc(centre - reach * spread + 0.5));
    const end = Math.min(before, Math.trunc(centre + reach * spread + 0.5));
    const weights = Array.from({length: end - first}, (_, j) => weight((j + first - centre + 0.5) / spread));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map(w => w / sum)];
  });
  const largest = Math.max(...exact.map(([, weights]) => Math.max(...weights)));
  let bits = 0;
  while (bits < 22 && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** 15) bits++;
  const whole = w => Math.trunc(w * 2 ** bits + Math.sign(w) * 0.5);
  return {taps: exact.map(([first, weights]) => [first, weights.map(whole)]), bits};
}

// A plane [height, width] of grey levels to [rows, columns]: along rows, then along columns, rounded to levels each time.
function resize(plane, height, width, rows, columns, mode) {
  const level = (sum, bits) => Math.min(255, Math.max(0, Math.floor(sum / 2 ** bits + 0.5)));
  const across = resampling(width, columns, mode), down = resampling(height, rows, mode);
  const half = new Uint8Array(height * columns), whole = new Uint8Array(rows * columns);
  for (let y = 0; y < height; y++) across.taps.forEach(([first, weights], x) => {
    let sum = 0;
    for (let j = 0; j < weights.length; j++) sum += weights[j] * plane[y * width + first + j];
    half[y * columns + x] = level(sum, across.bits);
  });
  down.taps.forEach(([first, weights], y) => {
    for (let x = 0; x < columns; x++) {
      let sum = 0;
      for (let j = 0; j < weights.length; j++) sum += weights[j] * half[(first + j) * columns + x];
      whole[y * columns + x] = level(sum, down.bits);
    }
  });
  return whole;
}

// As Python rounds: a half to the even neighbour.
const rounded = x => x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);

// Pixels of the whole image, alpha on white, as planes: red, green and blue, or grey.
function planes(bitmap, channels) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = 'white';
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, bitmap.width, bitmap.height).data, count = rgba.length / 4;
  return Array.from({length: channels}, (_, c) => {
    const plane = new Uint8Array(count);
    for (let i = 0; i < count; i++) plane[i] = channels === 3 ? rgba[4 * i + c]
      : (19595 * rgba[4 * i] + 38470 * rgba[4 * i + 1] + 7471 * rgba[4 * i + 2] + 32768) >> 16;
    return plane;
  });
}

// The network's input: short side resized, centre cropped, normalised.
function prepare(bitmap, {input_size: [channels, rows, columns], resize: wanted, interpolation, mean, std}) {
  const {width, height} = bitmap, short = Math.min(width, height);
  const side = length => length === short ? wanted : Math.trunc(wanted * length / short);
  const [tall, wide] = [side(height), side(width)];
  const [top, left] = [rounded((tall - rows) / 2), rounded((wide - columns) / 2)];
  const input = new Float32Array(channels * rows * columns);
  planes(bitmap, channels).forEach((plane, c) => {
    const resized = resize(plane, height, width, tall, wide, interpolation);
    for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
      const inside = y + top >= 0 && y + top < tall && x + left >= 0 && x + left < wide;
      const level = inside ? resized[(y + top) * wide + x + left] : 0;
      input[(c * rows + y) * columns + x] = (level - 255 * mean[c]) / (255 * std[c]);
    }
  });
  return new ort.Tensor('float32', input, [1, channels, rows, columns]);
}

// --------------------------------------------------------------------------------------------------------------- running the forms

const median = numbers => {
  const sorted = [...numbers].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

const softmax = logits => {
  const largest = Math.max(...logits), powers = Array.from(logits, x => Math.exp(x - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(p => p / sum);
};

async function logitsOf(session, input) {
  const outputs = await session.run({images: input});
  return outputs.logits.data;
}

// The native engine as a session: the same input, the same output.
async function nativeSession() {
  const {ENGINE, load} = await import('./repvgg_engine.mjs');
  const bytes = async name => (await fetch(name)).arrayBuffer();
  const plan = await (await fetch('plan.json')).text();
  const net = await load(await bytes(ENGINE), await bytes('model.safetensors'), plan);
  return {run: async ({images}) => ({logits: {data: net.run(images.data)}})};
}

async function turn(session, input, runs) {
  const started = performance.now();
  for (let i = 0; i < runs; i++) await session.run({images: input});
  return (performance.now() - started) / runs;
}

// Milliseconds an image by form, one figure a round, the forms taking turns.
async function time(sessions, input) {
  const first = {}, forms = Object.keys(sessions), times = Object.fromEntries(forms.map(form => [form, []]));
  for (const form of forms) first[form] = await turn(sessions[form], input, WARMUP);
  const slower = Math.max(...Object.values(first));
  const runs = Math.max(1, Math.ceil(TURN / slower));
  const rounds = Math.max(3, Math.min(ROUNDS, Math.floor(BUDGET / (2 * runs * slower))));
  for (let round = 0; round < rounds; round++)
    for (const form of round % 2 ? [...forms].reverse() : forms) times[form].push(await turn(sessions[form], input, runs));
  return {times, runs, rounds};
}

// ------------------------------------------------------------------------------------------------------------------------ the page

const element = (tag, text = '', attributes = {}) => Object.assign(document.createElement(tag), {textContent: text}, attributes);
const milliseconds = ms => ms < 1 ? ms.toFixed(3) : ms < 100 ? ms.toFixed(2) : ms.toFixed(0);

function say(...parts) {
  $('#verdict').replaceChildren(...parts.map((part, i) => i % 2 ? element('strong', part) : part));
}

function showPreview(bitmap) {
  const canvas = $('#preview');
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.getContext('2d').drawImage(bitmap, 0, 0);
  canvas.classList.toggle('small', Math.max(bitmap.width, bitmap.height) <= 64);
  canvas.hidden = false;
  $('#invitation').textContent = 'Drop another, or choose one';
}

function showAnswers(form, logits, classes) {
  const probabilities = softmax(logits);
  const best = probabilities.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0]).slice(0, TOP);
  $(`#${form} .answers`).replaceChildren(...best.map(([p, i]) => {
    const row = element('li');
    row.append(element('progress', '', {max: 1, value: p}), element('span', classes ? classes[i] : `class ${i}`),
      element('span', `${(100 * p).toFixed(1)}%`));
    return row;
  }));
}

function showTimes(times) {
  const medians = Object.fromEntries(Object.entries(times).map(([form, of]) => [form, median(of)]));
  const slower = Math.max(...Object.values(medians));
  const show = (form, ms) => {
    $(`#${form} .time output`).textContent = milliseconds(ms);
    $(`#${form} .bar i`).style.width = `${100 * ms / slower}%`;
  };
  const both = () => {
    show('training', medians.training);
    show('deploy', medians[$('#engine :checked').value]);
  };
  $('#engine').onchange = both;
  both();
  if (medians.native) $('#engine output').textContent = `${milliseconds(medians.deploy)} and ${milliseconds(medians.native)} ms: ` +
    `${(medians.deploy / medians.native).toFixed(2)} times the speed, on one thread`;
  return medians.training / medians.deploy;
}

async function read(blob, model, sessions) {
  const bitmap = await createImageBitmap(blob, {premultiplyAlpha: 'none', colorSpaceConversion: 'none'})
    .catch(() => { throw new Error('this is not an image that your browser can read'); });
  if (bitmap.width * bitmap.height > LARGEST) throw new Error('this image has more than 100 million pixels');
  if (Math.max(bitmap.width, bitmap.height) > 32 * Math.min(bitmap.width, bitmap.height))
    throw new Error('this image is more than 32 times as long as wide');
  showPreview(bitmap);
  say('Reading, in turns …');
  const input = prepare(bitmap, model.preprocessing);
  const logits = {};
  for (const form of Object.keys(sessions)) {
    logits[form] = Array.from(await logitsOf(sessions[form], input));
    if (FORMS.includes(form)) showAnswers(form, logits[form], model.classes);
  }
  const apart = Math.max(...logits.training.map((x, i) => Math.abs(x - logits.deploy[i])));
  const difference = apart / Math.max(...logits.training.map(Math.abs));
  const label = form => logits[form].indexOf(Math.max(...logits[form]));
  const same = Object.keys(sessions).every(form => label(form) === label('training'));
  const {times, runs, rounds} = await time(sessions, input);
  const speedup = showTimes(times);
  $('#verdict').classList.toggle('wrong', !same);
  const name = model.classes ? model.classes[label('deploy')] : `class ${label('deploy')}`;
  say('', same ? name : 'Different answers', same ? ', say both forms; the deploy form has ' : '; the deploy form has ', `${speedup.toFixed(2)} times`,
    ` the speed. The logits differ by ${difference.toExponential(1)} of the largest: rounding in float32.`);
  $('#protocol').textContent = `Medians of ${rounds} rounds in which the forms took turns, ${runs} runs a turn, on ` +
    `${ort.env.wasm.numThreads} ${ort.env.wasm.numThreads === 1 ? 'thread' : 'threads'} of WebAssembly (onnxruntime-web ` +
    `${ort.env.versions.web}), which merges batch norms into convolutions in both forms, but not the branches.`;
  return {logits, times, speedup, same, difference};
}

async function main() {
  const model = await (await fetch('model.json')).json();
  const sessions = {};
  $('#problem').textContent = 'Loading …';
  for (const form of FORMS) {
    sessions[form] = await ort.InferenceSession.create(model.forms[form].file, {executionProviders: ['wasm']});
    const {operators, parameters, bytes} = model.forms[form];
    $(`#${form} .facts`).textContent = `${operators} operators, ${(parameters / 1e6).toFixed(2)} M parameters, ` +
      `${(bytes / 1e6).toFixed(1)} MB`;
  }
  if (model.native) sessions.native = await nativeSession();
  $('#engine').hidden = !model.native;
  document.title = `${model.name || 'RepVGG'} in the browser`;

  let busy = Promise.resolve();
  const show = blob => busy = busy.then(async () => {
    document.body.dataset.state = 'busy';
    try {
      self.answer = await read(blob, model, sessions);
    } catch (problem) {
      self.answer = {problem: problem.message};
      say(`${problem.message[0].toUpperCase()}${problem.message.slice(1)}.`);
    }
    document.body.dataset.state = 'done';
  });

  const drop = $('#drop'), file = $('#file');
  const press = chosen => {
    for (const button of $('#examples').children) button.ariaPressed = String(button === chosen);
  };
  file.addEventListener('change', () => file.files[0] && (press(), show(file.files[0])));
  for (const kind of ['dragover', 'dragleave', 'drop']) addEventListener(kind, event => {
    event.preventDefault();
    drop.classList.toggle('over', kind === 'dragover');
    if (kind === 'drop' && event.dataTransfer.files[0]) press(), show(event.dataTransfer.files[0]);
  });
  for (const example of model.examples) {
    const button = element('button', '', {type: 'button', title: example.name, ariaPressed: 'false'});
    const image = element('img', '', {src: example.file, alt: example.name});
    image.addEventListener('load', () => image.classList.toggle('small', image.naturalWidth <= 64));
    button.append(image);
    button.addEventListener('click', async () => {
      press(button);
      show(await (await fetch(example.file)).blob());
    });
    $('#examples').append(button);
  }
  $('#examples').hidden = !model.examples.length;
  $('#problem').hidden = true;
  $('#stage').hidden = false;
  document.body.dataset.state = 'ready';
}

main().catch(problem => {
  $('#problem').hidden = false;
  $('#problem').textContent = `The page cannot run here: ${problem.message}`;
});
