/* From a file to the pixels that the network sees, as cvt_keras.data.images makes them. */

import { formatOf, hasAlpha, isAnimated, isCutOff, isGreyOf16Bits, prepare, READABLE } from "./formats.js";

// As cvt_keras/data/images.py has it: 8192 x 8192.
export const MAX_PIXELS = 67_108_864;
// So many pixels of three colours with 16 bits each, where nothing of them can be compressed.
export const MAX_BYTES = 403_000_000;
// More of a side than browsers' canvases have.
export const MAX_SIDE = 32_767;
// Drawn and read at a time: the whole of a photo is more than the canvas of a phone may hold.
const STRIP_PIXELS = 2 ** 21;
// What 12 bits leave of a pixel when a browser takes the upper 8 of its 16.
const TWELVE_BITS_AS_8 = 16;
// EXIF orientations under which the stored columns, or rows, run backwards; from 5 on, rows are columns.
const COLUMNS_BACKWARDS = [2, 3, 7, 8];
const ROWS_BACKWARDS = [3, 4, 6, 7];

/** An image that is not taken. Its message is for the user. */
export class Refused extends Error {}

const count = new Intl.NumberFormat("en");
const READ_HERE = `${READABLE.slice(0, -1).join(", ")} and ${READABLE.at(-1)}`;

/** A decoded image file, upright. Close it after use. */
export class Picture {
  /**
   * @param {ImageBitmap} bitmap as it is stored, but for what the browser has turned.
   * @param {number} orientation the EXIF orientation that is left to be applied.
   * @param {boolean} grey16 whether the browser has halved 16 bits of grey.
   */
  constructor(bitmap, orientation, grey16) {
    Object.assign(this, { bitmap, orientation, grey16 });
    const sides = [bitmap.width, bitmap.height];
    [this.width, this.height] = orientation >= 5 ? sides.reverse() : sides;
  }

  /** Draws it on white over the whole of a canvas. */
  draw(context) {
    const { width, height } = context.canvas;
    const [across, down] = this.orientation >= 5 ? [height, width] : [width, height];
    const x = COLUMNS_BACKWARDS.includes(this.orientation) ? [-across, across] : [across, 0];
    const y = ROWS_BACKWARDS.includes(this.orientation) ? [-down, down] : [down, 0];
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.save();
    if (this.orientation >= 5) context.transform(0, x[0], y[0], 0, y[1], x[1]);
    else context.transform(x[0], 0, 0, y[0], x[1], y[1]);
    context.drawImage(this.bitmap, 0, 0, 1, 1);
    context.restore();
  }

  close() {
    this.bitmap.close();
  }
}

/**
 * Decodes an image file as training does. Its colours are the numbers in the file, whatever its colour profile says. A photo is
 * turned as its EXIF orientation says. Of an animation, the first frame is taken.
 *
 * @param {Blob} file
 * @returns {Promise<Picture>}
 * @throws {Refused} for what is no image, broken, too large, or would get other pixels than in training. As far as the header
 *   tells, before anything is decoded.
 */
export async function decode(file) {
  if (!file.size) throw new Refused("The file is empty.");
  if (file.size > MAX_BYTES) {
    const megabytes = Math.ceil(file.size / 1e6);
    throw new Refused(`The file is too large: it has ${megabytes} MB, the limit is ${MAX_BYTES / 1e6}.`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  const format = formatOf(bytes);
  refuseWhatDiffers(format, bytes);
  const grey16 = format === "PNG" && isGreyOf16Bits(bytes);
  const cutOff = format === "JPEG" && isCutOff(bytes);
  const broken = new Refused(
    cutOff
      ? "This JPEG is cut off: the end of the file is missing. Copy it again, or open it in an image program and save it anew."
      : `This ${format} is broken, or of a kind that this browser can't read.`,
  );
  const { blob, orientation } = prepare(format, file, bytes);
  const [width, height] = await sides(blob, broken);
  if (width * height > MAX_PIXELS) {
    const megapixels = (Math.ceil((width * height) / 1e5) / 10).toFixed(1);
    throw new Refused(`The image is too large: it has ${megapixels} megapixels, the limit is ${Math.floor(MAX_PIXELS / 1e6)}.`);
  }
  if (Math.max(width, height) > MAX_SIDE) {
    const [longer, most] = [Math.max(width, height), MAX_SIDE].map((side) => count.format(side));
    throw new Refused(`The image is too long: its longer side has ${longer} pixels, the limit is ${most}.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw broken;
  }
  return new Picture(bitmap, orientation, grey16);
}

/** Throws for what training reads, if at all, in another way than browsers. */
function refuseWhatDiffers(format, bytes) {
  if (!format) throw new Refused(`This is not an image that can be read here. ${READ_HERE} images can.`);
  if (!READABLE.includes(format)) {
    throw new Refused(`This is a file in the ${format} format, which can't be read here. Save it as a JPEG or PNG first.`);
  }
  if (format !== "AVIF") return;
  // Chromium 156 takes full-range values for limited ones in both: its pixels are up to 20 of 255 from training's.
  if (isAnimated(bytes)) {
    throw new Refused("This AVIF is animated, and the browser would change its colours. Save it as a PNG first.");
  }
  if (hasAlpha(bytes)) {
    throw new Refused("This AVIF is partly transparent, and the browser would change its colours. Save it as a PNG first.");
  }
}

/** Width and height, from the header alone: an image that is not shown is not decoded. */
async function sides(blob, broken) {
  const image = new Image();
  const url = URL.createObjectURL(blob);
  try {
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = () => reject(broken);
      image.src = url;
    });
    return [image.naturalWidth, image.naturalHeight];
  } finally {
    URL.revokeObjectURL(url);
  }
}

/**
 * Stretches an image to a square: bilinear, with a filter as wide as a pixel of the smaller image, as tf.image.resize with
 * antialias; rounded. Transparent pixels are laid on white.
 *
 * @param {Picture} picture
 * @param {number} size side of the square, in pixels.
 * @returns {Promise<Uint8Array>} `(size, size, 3)`.
 * @throws {Refused} for a grey picture of which the browser has left 16 shades.
 */
export async function stretch({ bitmap, orientation, grey16 }, size) {
  const { width, height } = bitmap;
  const rows = Math.max(1, Math.min(height, Math.floor(STRIP_PIXELS / width)));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, rows];
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#fff";
  let brightest = 0;
  const [across, down] = [taps(width, size), taps(height, size)];
  const sums = new Float64Array(size * size * 3);
  const line = new Float64Array(size * 3);
  for (let top = 0; top < height; top += rows) {
    const n = Math.min(rows, height - top);
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, n, 0, 0, width, n);
    const { data } = context.getImageData(0, 0, width, n); // (n, width, 4)
    if (grey16) for (let i = 0; i < data.length; i += 4) brightest = Math.max(brightest, data[i]);
    for (let y = 0; y < n; y++) {
      narrow(data, y * width * 4, across, line);
      down.forEach(({ start, weights }, row) => {
        const weight = weights[top + y - start];
        if (weight) for (let i = 0; i < line.length; i++) sums[row * line.length + i] += weight * line[i];
      });
    }
    await new Promise((resolve) => setTimeout(resolve)); // the page stays alive
  }
  if (grey16 && brightest < TWELVE_BITS_AS_8) {
    throw new Refused(
      "This PNG stores 12 bits of grey in 16, as scanners and microscopes do, and the browser reads it as almost black. " +
        "Save it with 8 bits first.",
    );
  }
  return turn(Uint8Array.from(sums, roundHalfToEven), size, orientation);
}

/** Turns a square as an EXIF orientation says. It may come after the stretch, which treats both sides alike. */
function turn(pixels, size, orientation) {
  if (orientation === 1) return pixels;
  const turned = new Uint8Array(pixels.length);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      let [column, row] = orientation >= 5 ? [y, x] : [x, y];
      if (COLUMNS_BACKWARDS.includes(orientation)) column = size - 1 - column;
      if (ROWS_BACKWARDS.includes(orientation)) row = size - 1 - row;
      const from = 3 * (row * size + column);
      turned.set(pixels.subarray(from, from + 3), 3 * (y * size + x));
    }
  }
  return turned;
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
