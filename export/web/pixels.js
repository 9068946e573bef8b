/* Turns an image file into the network's input pixels, in the same way as cvt_keras.data.images. */

import { formatOf, hasAlpha, isAnimated, isCutOff, isGreyOf16Bits, prepare, READABLE } from "./formats.js";

// 8192 x 8192, as in cvt_keras/data/images.py.
export const MAX_PIXELS = 67_108_864;
// MAX_PIXELS of 16-bit RGB, uncompressed.
export const MAX_BYTES = 403_000_000;
// Largest side of a browser's canvas, in pixels.
export const MAX_SIDE = 32_767;
// Pixels drawn and read at a time: a whole photo may exceed the canvas of a phone.
const STRIP_PIXELS = 2 ** 21;
// A browser takes the upper 8 of 16 bits: values of 12 bits stay below this.
const TWELVE_BITS_AS_8 = 16;
// EXIF orientations whose stored columns, or rows, run backwards. From 5 on, rows and columns are swapped.
const COLUMNS_BACKWARDS = [2, 3, 7, 8];
const ROWS_BACKWARDS = [3, 4, 6, 7];

/** An image that the page refuses. Its message is for the user. */
export class Refused extends Error {}

const count = new Intl.NumberFormat("en");
const READABLE_NAMES = `${READABLE.slice(0, -1).join(", ")} and ${READABLE.at(-1)}`;

/** A decoded image file, upright. Close it after use. */
export class Picture {
  /**
   * @param {ImageBitmap} bitmap as decoded by the browser.
   * @param {number} orientation the EXIF orientation that the browser has not applied.
   * @param {boolean} grey16 whether the file is grey with 16 bits, of which the browser keeps 8.
   */
  constructor(bitmap, orientation, grey16) {
    Object.assign(this, { bitmap, orientation, grey16 });
    const sides = [bitmap.width, bitmap.height];
    [this.width, this.height] = orientation >= 5 ? sides.reverse() : sides;
  }

  /** Draws it on white, stretched over the whole canvas. */
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
 * Decodes an image file as training does: colour profiles are ignored, the EXIF orientation is applied, and an animation gives
 * its first frame.
 *
 * @param {Blob} file
 * @returns {Promise<Picture>}
 * @throws {Refused} if the file is not an image, is damaged or too large, or would get other pixels than in training. If the
 *   header shows it, before decoding.
 */
export async function decode(file) {
  if (!file.size) throw new Refused("The file is empty.");
  if (file.size > MAX_BYTES) {
    const megabytes = Math.ceil(file.size / 1e6);
    throw new Refused(`The file is too large: ${megabytes} MB. The limit is ${MAX_BYTES / 1e6} MB.`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  const format = formatOf(bytes);
  refuseUnreadable(format, bytes);
  const grey16 = format === "PNG" && isGreyOf16Bits(bytes);
  const cutOff = format === "JPEG" && isCutOff(bytes);
  const damaged = new Refused(
    cutOff
      ? "This JPEG is cut off: the end of the file is missing. Copy it again, or open it in an image editor and save it."
      : `This ${format} is damaged, or this browser can't read this kind of ${format}.`,
  );
  const { blob, orientation } = prepare(format, file, bytes);
  const [width, height] = await sides(blob, damaged);
  if (width * height > MAX_PIXELS) {
    const megapixels = (Math.ceil((width * height) / 1e5) / 10).toFixed(1);
    throw new Refused(`The image is too large: ${megapixels} megapixels. The limit is ${Math.floor(MAX_PIXELS / 1e6)}.`);
  }
  if (Math.max(width, height) > MAX_SIDE) {
    const [longer, limit] = [Math.max(width, height), MAX_SIDE].map((side) => count.format(side));
    throw new Refused(`The image is too long: its longer side has ${longer} pixels. The limit is ${limit}.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw damaged;
  }
  return new Picture(bitmap, orientation, grey16);
}

/** Throws for a file that browsers can't read, or read differently from training. */
function refuseUnreadable(format, bytes) {
  if (!format) throw new Refused(`This file is not an image that this page can read. It reads ${READABLE_NAMES}.`);
  if (!READABLE.includes(format)) {
    throw new Refused(`This page can't read ${format} files. Save the image as a JPEG or PNG first.`);
  }
  if (format !== "AVIF") return;
  // Chromium 156 reads full-range values as limited-range in both cases. Its pixels differ from training's by up to 20 of 255.
  if (isAnimated(bytes)) {
    throw new Refused("This AVIF is animated, and the browser would change its colours. Save it as a PNG first.");
  }
  if (hasAlpha(bytes)) {
    throw new Refused("This AVIF is partly transparent, and the browser would change its colours. Save it as a PNG first.");
  }
}

/** Returns width and height from the header: the browser does not decode an image that is not shown. */
async function sides(blob, damaged) {
  const image = new Image();
  const url = URL.createObjectURL(blob);
  try {
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = () => reject(damaged);
      image.src = url;
    });
    return [image.naturalWidth, image.naturalHeight];
  } finally {
    URL.revokeObjectURL(url);
  }
}

/**
 * Stretches an image to a size, as tf.image.resize does with method="bilinear" and antialias=True, and rounds to uint8.
 * Transparent pixels are laid on white.
 *
 * @param {Picture} picture
 * @param {number} height in pixels.
 * @param {number} width in pixels; without it, the result is a square.
 * @returns {Promise<Uint8Array>} `(height, width, 3)`.
 * @throws {Refused} for a 16-bit grey picture that uses 12 bits only, of which the browser leaves 16 shades.
 */
export async function stretch({ bitmap, orientation, grey16 }, height, width = height) {
  // Stretches the stored image first, then orients the small result.
  const [columns, rows] = orientation >= 5 ? [height, width] : [width, height];
  const stripRows = Math.max(1, Math.min(bitmap.height, Math.floor(STRIP_PIXELS / bitmap.width)));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, stripRows];
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#fff";
  let brightest = 0;
  const [across, down] = [taps(bitmap.width, columns), taps(bitmap.height, rows)];
  const sums = new Float64Array(rows * columns * 3);
  const line = new Float64Array(columns * 3);
  for (let top = 0; top < bitmap.height; top += stripRows) {
    const n = Math.min(stripRows, bitmap.height - top);
    context.fillRect(0, 0, bitmap.width, stripRows);
    context.drawImage(bitmap, 0, top, bitmap.width, n, 0, 0, bitmap.width, n);
    const { data } = context.getImageData(0, 0, bitmap.width, n); // (n, bitmap.width, 4)
    if (grey16) for (let i = 0; i < data.length; i += 4) brightest = Math.max(brightest, data[i]);
    for (let y = 0; y < n; y++) {
      resizeRow(data, y * bitmap.width * 4, across, line);
      down.forEach(({ start, weights }, row) => {
        const weight = weights[top + y - start];
        if (weight) for (let i = 0; i < line.length; i++) sums[row * line.length + i] += weight * line[i];
      });
    }
    await new Promise((resolve) => setTimeout(resolve)); // lets the page respond
  }
  if (grey16 && brightest < TWELVE_BITS_AS_8) {
    throw new Refused(
      "This PNG stores 12 bits of grey in 16, as scanners and microscopes do, and the browser reads it as almost black. " +
        "Save it with 8 bits first.",
    );
  }
  return orient(Uint8Array.from(sums, roundHalfToEven), rows, columns, orientation);
}

/** Applies an EXIF orientation to pixels `(rows, columns, 3)`. From orientation 5 on, the result is `(columns, rows, 3)`. */
function orient(pixels, rows, columns, orientation) {
  if (orientation === 1) return pixels;
  const oriented = new Uint8Array(pixels.length);
  const [height, width] = orientation >= 5 ? [columns, rows] : [rows, columns];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let [column, row] = orientation >= 5 ? [y, x] : [x, y];
      if (COLUMNS_BACKWARDS.includes(orientation)) column = columns - 1 - column;
      if (ROWS_BACKWARDS.includes(orientation)) row = rows - 1 - row;
      const source = 3 * (row * columns + column);
      oriented.set(pixels.subarray(source, source + 3), 3 * (y * width + x));
    }
  }
  return oriented;
}

/** Resizes the row of RGBA pixels that starts at `offset` of `data`, and writes its RGB to `line`. */
function resizeRow(data, offset, across, line) {
  across.forEach(({ start, weights }, column) => {
    let [red, green, blue] = [0, 0, 0];
    for (let i = 0, source = offset + 4 * start; i < weights.length; i++, source += 4) {
      red += weights[i] * data[source];
      green += weights[i] * data[source + 1];
      blue += weights[i] * data[source + 2];
    }
    line[3 * column] = red;
    line[3 * column + 1] = green;
    line[3 * column + 2] = blue;
  });
}

/** Returns, for each of `to` pixels, the first of the `from` pixels that it averages, and their weights, whose sum is 1. */
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

/** Rounds as tf.round does. The first rounding hides float errors of the sums, so that 127.5 stays a half. */
function roundHalfToEven(value) {
  value = Math.round(value * 1e6) / 1e6;
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}
