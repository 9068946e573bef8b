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
// Weight of a pixel by its distance, which is below `radius`.
const KERNELS = {
  bilinear: { radius: 1, weight: (x) => Math.max(0, 1 - x) },
  // Keys' cubic, a = -0.5.
  bicubic: {
    radius: 2,
    weight: (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((2.5 - 0.5 * x) * x - 4) * x + 2),
  },
};

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
 * Brings an image to the network's size as training does (cvt_keras.data.images.fit), and rounds to uint8. Transparent pixels are
 * laid on white.
 *
 * @param {Picture} picture
 * @param {number} height in pixels.
 * @param {number} width in pixels.
 * @param {{resize?: string, crop_pct?: number, interpolation?: string}} resizing how the run resizes images: the fields of its
 *   recipe.json. Other fields are ignored.
 *   - `resize`: "stretch", the default, ignores the aspect ratio. "crop" scales the image until it just covers
 *     `height / crop_pct` by `width / crop_pct`, then cuts out the middle.
 *   - `interpolation`: "bilinear", the default, or "bicubic"; both as tf.image.resize with antialias=True.
 * @returns {Promise<Uint8Array>} `(height, width, 3)`.
 * @throws {Refused} for a 16-bit grey picture that uses 12 bits only, of which the browser leaves 16 shades.
 */
export async function fit(picture, height, width, resizing = {}) {
  const { resize = "stretch", crop_pct = 0.875, interpolation = "bilinear" } = resizing;
  const { bitmap, orientation, grey16 } = picture;
  const scaled = resize === "crop" ? covering(picture, height, width, crop_pct) : [height, width];
  // Resizes the stored image first, then orients the small result.
  const stored = ([down, across]) => (orientation >= 5 ? [across, down] : [down, across]);
  const [[rows, columns], [scaledRows, scaledColumns]] = [stored([height, width]), stored(scaled)];
  const axis = (from, to, size, backwards) => {
    const before = Math.floor((to - size) / 2); // cut off above, or on the left
    return taps(from, to, backwards ? to - size - before : before, size, KERNELS[interpolation]);
  };
  const across = axis(bitmap.width, scaledColumns, columns, COLUMNS_BACKWARDS.includes(orientation));
  const down = axis(bitmap.height, scaledRows, rows, ROWS_BACKWARDS.includes(orientation));
  // The pixels that the result depends on. A 16-bit grey picture is read as a whole, for its brightest pixel.
  const [left, right] = grey16 ? [0, bitmap.width] : span(across);
  const [top, bottom] = grey16 ? [0, bitmap.height] : span(down);
  const n = right - left;
  const stripRows = Math.max(1, Math.min(bottom - top, Math.floor(STRIP_PIXELS / n)));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [n, stripRows];
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#fff";
  let brightest = 0;
  const sums = new Float64Array(rows * columns * 3);
  const line = new Float64Array(columns * 3);
  for (let first = top; first < bottom; first += stripRows) {
    const last = Math.min(first + stripRows, bottom);
    context.fillRect(0, 0, n, stripRows);
    context.drawImage(bitmap, left, first, n, last - first, 0, 0, n, last - first);
    const { data } = context.getImageData(0, 0, n, last - first); // (last - first, n, 4)
    if (grey16) for (let i = 0; i < data.length; i += 4) brightest = Math.max(brightest, data[i]);
    for (let y = first; y < last; y++) {
      resizeRow(data, 4 * ((y - first) * n - left), across, line);
      down.forEach(({ start, weights }, row) => {
        const weight = weights[y - start];
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
  return orient(toBytes(sums), rows, columns, orientation);
}

/** Stretches an image to a size bilinearly: `fit` for a run that stretches. Without a width, the result is a square. */
export function stretch(picture, height, width = height) {
  return fit(picture, height, width);
}

/** Returns the height and width at which an image just covers the box that its middle is cut from, in training's integers. */
function covering(picture, height, width, cropPct) {
  const [tall, wide] = [Math.floor(height / cropPct), Math.floor(width / cropPct)];
  const quotient = (a, b) => (a - (a % b)) / b;
  return [
    Math.max(tall, quotient(wide * picture.height, picture.width)),
    Math.max(wide, quotient(tall * picture.width, picture.height)),
  ];
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

/** Resizes a row of RGBA pixels, whose pixel 0 would be at `offset` of `data`, and writes its RGB to `line`. */
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

/**
 * Returns, for `count` pixels of a side that is resized from `from` to `to` pixels, beginning with pixel `first`: the first of the
 * `from` pixels that it depends on, and their weights, whose sum is 1.
 */
function taps(from, to, first, count, { radius, weight }) {
  const scale = from / to;
  const spread = Math.max(1, scale); // antialiasing: a wider kernel
  return Array.from({ length: count }, (_, i) => {
    const centre = (first + i + 0.5) * scale;
    const start = Math.max(0, Math.ceil(centre - radius * spread - 0.5));
    const end = Math.min(from - 1, Math.floor(centre + radius * spread - 0.5));
    const weights = Float64Array.from({ length: end - start + 1 }, (_, j) =>
      weight(Math.abs(start + j + 0.5 - centre) / spread),
    );
    const sum = weights.reduce((a, b) => a + b);
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

/** Returns the first pixel that `taps` depend on, and the one after the last. */
function span(taps) {
  const { start, weights } = taps.at(-1);
  return [taps[0].start, start + weights.length];
}

/** Rounds half to even and clamps to 0..255, as training does. The first rounding hides float errors, so that 127.5 stays a half. */
function toBytes(values) {
  return new Uint8Array(Uint8ClampedArray.from(values, (value) => Math.round(value * 1e6) / 1e6).buffer);
}
