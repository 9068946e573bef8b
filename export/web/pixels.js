/* From a file to the pixels that the network sees, as cvt_keras.data.images.stretch makes them. */

// As export/saved_model.py has it.
export const MAX_PIXELS = 50_000_000;
// 50 megapixels of 16 bits a channel take 300 MB where nothing of them can be compressed.
export const MAX_BYTES = 300_000_000;
// More of a side than browsers' canvases have.
export const MAX_SIDE = 32_767;
// Drawn and read at a time: the whole of a photo is more than the canvas of a phone may hold.
const STRIP_PIXELS = 2 ** 21;

/** An image that is not taken. Its message is for the user. */
export class Refused extends Error {}

const count = new Intl.NumberFormat("en");

/**
 * Decodes an image file. Its colours are taken as the numbers that stand in the file, whatever its colour profile says, as in
 * training; a photo is turned as its camera says.
 *
 * @param {Blob} file
 * @returns {Promise<ImageBitmap>} close it after use.
 * @throws {Refused} for what is no image, broken or too large. That is read from the header, before anything is decoded.
 */
export async function decode(file) {
  if (file.size > MAX_BYTES) {
    throw new Refused(`The file has ${count.format(Math.ceil(file.size / 1e6))} MB; at most ${MAX_BYTES / 1e6} are taken.`);
  }
  const [width, height] = await sides(file);
  if (width * height > MAX_PIXELS) {
    const found = (Math.ceil(width * height / 1e5) / 10).toFixed(1);
    throw new Refused(`The image has ${found} megapixels; at most ${MAX_PIXELS / 1e6} are taken.`);
  }
  if (Math.max(width, height) > MAX_SIDE) {
    const [found, most] = [Math.max(width, height), MAX_SIDE].map((side) => count.format(side));
    throw new Refused(`The image's longer side has ${found} pixels; at most ${most} are taken.`);
  }
  try {
    return await createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw new Refused("The image is broken, or of a kind that this browser can't decode.");
  }
}

/** Width and height, from the header alone: an image that is not shown is not decoded. */
async function sides(file) {
  const image = new Image();
  const url = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = () => reject(new Refused("This is no image that this browser can read."));
      image.src = url;
    });
    return [image.naturalWidth, image.naturalHeight];
  } finally {
    URL.revokeObjectURL(url);
  }
}

/**
 * Stretches an image to a square: bilinear, with a filter as wide as a pixel of the smaller image, as tf.image.resize with
 * antialias; rounded. Alpha is left out, and a transparent pixel is black.
 *
 * @param {ImageBitmap} bitmap
 * @param {number} size side of the square, in pixels.
 * @returns {Promise<Uint8Array>} `(size, size, 3)`.
 */
export async function stretch(bitmap, size) {
  const { width, height } = bitmap;
  const rows = Math.max(1, Math.min(height, Math.floor(STRIP_PIXELS / width)));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, rows];
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.imageSmoothingEnabled = false;
  const [across, down] = [taps(width, size), taps(height, size)];
  const sums = new Float64Array(size * size * 3);
  const line = new Float64Array(size * 3);
  for (let top = 0; top < height; top += rows) {
    const n = Math.min(rows, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, n, 0, 0, width, n);
    const { data } = context.getImageData(0, 0, width, n); // (n, width, 4)
    for (let y = 0; y < n; y++) {
      narrow(data, y * width * 4, across, line);
      down.forEach(({ start, weights }, row) => {
        const weight = weights[top + y - start];
        if (weight) for (let i = 0; i < line.length; i++) sums[row * line.length + i] += weight * line[i];
      });
    }
    await new Promise((resolve) => setTimeout(resolve)); // the page stays alive
  }
  return Uint8Array.from(sums, roundHalfToEven);
}

/** A row of RGBA pixels at `at` of `data` -> the RGB ones of `line`. */
function narrow(data, at, across, line) {
  across.forEach(({ start, weights }, column) => {
    let [red, green, blue] = [0, 0, 0];
    for (let i = 0, from = at + 4 * start; i < weights.length; i++, from += 4) {
      red += weights[i] * data[from];
      green += weights[i] * data[from + 1];
      blue += weights[i] * data[from + 2];
    }
    line[3 * column] = red;
    line[3 * column + 1] = green;
    line[3 * column + 2] = blue;
  });
}

/** For each of `to` pixels: the first of the `from` pixels that it is made of, and their weights, whose sum is 1. */
function taps(from, to) {
  const scale = from / to;
  const reach = Math.max(1, scale);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const start = Math.max(0, Math.ceil(centre - reach - 0.5));
    const end = Math.min(from - 1, Math.floor(centre + reach - 0.5));
    const weights = Float64Array.from({ length: end - start + 1 }, (_, j) =>
      Math.max(0, 1 - Math.abs(start + j + 0.5 - centre) / reach),
    );
    const sum = weights.reduce((a, b) => a + b);
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

/** As tf.round; the weights' sum may be off in the sixteenth digit, which must not make 127.5 another number. */
function roundHalfToEven(value) {
  value = Math.round(value * 1e6) / 1e6;
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}
