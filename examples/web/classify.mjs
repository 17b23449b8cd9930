// A classifier of gdfq in onnxruntime-web: pixels in, classes with their probabilities out.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

// Several threads need a page with cross-origin isolation.
ort.env.wasm.numThreads = 1;

const BEST = 5;

/** Load a file that takes pixels (`gdfq export DIR --raw-input`), and the names of its classes. */
export async function load(file, classes) {
  const session = await ort.InferenceSession.create(file);
  const [input] = session.inputMetadata;
  if (session.inputMetadata.length !== 1 || input.type !== "uint8" || input.shape.length !== 4) {
    throw new Error(`${file} must take pixels. Write it with: gdfq export DIR --raw-input`);
  }
  const answer = await fetch(classes);
  const names = answer.ok ? (await answer.text()).split(/\r?\n/).filter((name) => name) : [];
  return { session, input, names };
}

/** Return the most probable classes of a picture, and draw on the canvas what the network sees. */
export async function classify({ session, input, names }, picture, canvas) {
  const [, channels, height, width] = input.shape;
  const pixels = pixelsOf(picture, canvas, channels, height, width);
  const images = new ort.Tensor("uint8", pixels, [1, channels, height, width]);
  const started = performance.now();
  const results = await session.run({ [input.name]: images });
  const milliseconds = performance.now() - started;
  const outputs = results[session.outputNames[0]].data;
  const probabilities = session.outputNames[0] === "probabilities" ? outputs : softmax(outputs);
  const best = Array.from(probabilities, (probability, index) => ({
    name: names[index] ?? `class ${index}`,
    probability,
  })).sort((a, b) => b.probability - a.probability).slice(0, BEST);
  return { best, outputs, milliseconds };
}

/** Return the middle of a picture, scaled to cover the input, as [channel, row, column]. */
function pixelsOf(picture, canvas, channels, height, width) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const scale = Math.max(width / picture.width, height / picture.height);
  const [w, h] = [scale * picture.width, scale * picture.height];
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
  const { data } = context.getImageData(0, 0, width, height);
  const count = width * height;
  const pixels = new Uint8Array(channels * count);
  for (let i = 0; i < count; i++) {
    const [red, green, blue] = data.subarray(4 * i, 4 * i + 3);
    if (channels === 1) {
      pixels[i] = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16; // as Pillow's "L"
    } else {
      [pixels[i], pixels[count + i], pixels[2 * count + i]] = [red, green, blue];
    }
  }
  return pixels;
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const total = powers.reduce((sum, power) => sum + power);
  return powers.map((power) => power / total);
}
