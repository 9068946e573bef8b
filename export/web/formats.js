/* Reads an image file's format and EXIF orientation from its bytes, without decoding it. */

const ascii = (bytes, start, end) => String.fromCharCode(...bytes.subarray(start, end));
const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** The formats that both training and browsers read. */
export const READABLE = ["JPEG", "PNG", "GIF", "BMP", "WebP", "AVIF"];

// Name of a format -> whether the first bytes are those of such a file.
const SIGNATURES = {
  JPEG: (start) => start.startsWith("\xff\xd8\xff"),
  PNG: (start) => start.startsWith("\x89PNG\r\n\x1a\n"),
  GIF: (start) => /^GIF8[79]a/.test(start),
  BMP: (start) => start.startsWith("BM"),
  WebP: (start) => /^RIFF[^]{4}WEBP/.test(start),
  AVIF: (start) => /^[^]{4}ftyp(avif|avis|mif1[^]{4}([^]{4})*?avif)/.test(start),
  HEIC: (start) => /^[^]{4}ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1)/.test(start),
  TIFF: (start) => /^(II[*+]\0|MM\0[*+])/.test(start),
  SVG: (start) => /^(\xef\xbb\xbf)?\s*<(svg|\?xml|!--|!DOCTYPE svg)/.test(start),
  ICO: (start) => start.startsWith("\0\0\x01\0"),
  "JPEG XL": (start) => /^(\xff\x0a|\0\0\0\x0cJXL )/.test(start),
  "JPEG 2000": (start) => /^(\xff\x4f\xff\x51|\0\0\0\x0cjP {2})/.test(start),
  Photoshop: (start) => start.startsWith("8BPS"),
  PDF: (start) => start.startsWith("%PDF"),
};

/**
 * @param {Uint8Array} bytes of a file.
 * @returns {string | undefined} the format's name, whether or not it is `READABLE`.
 */
export function formatOf(bytes) {
  const start = ascii(bytes, 0, 64);
  return Object.keys(SIGNATURES).find((name) => SIGNATURES[name](start));
}

/** Whether a JPEG lacks its last bytes. */
export function isCutOff(bytes) {
  return ascii(bytes, bytes.length - 2) !== "\xff\xd9";
}

/** Whether a PNG is grey with 16 bits per pixel. */
export function isGreyOf16Bits(bytes) {
  const [bits, colours] = bytes.subarray(24, 26);
  return bits === 16 && colours === 0;
}

/** Whether an AVIF file is an image sequence. */
export function isAnimated(bytes) {
  return ascii(bytes, 8, 12) === "avis";
}

/** Whether an AVIF file has an alpha channel. */
export function hasAlpha(bytes) {
  return ascii(bytes, 0, 2 ** 14).includes("urn:mpeg:mpegB:cicp:systems:auxiliary:alpha");
}

/**
 * Returns the bytes that the browser decodes, and the EXIF orientation that the page has to apply.
 *
 * Browsers apply the orientation of a JPEG and an AVIF as training does. Chromium ignores it in a WebP, and in a PNG if it
 * follows the pixels. Other browsers may differ, so the page strips it from these two formats and applies it. The frames of
 * an animated PNG are stripped: training reads the still picture that the file holds for programs without animation.
 *
 * @param {string} format the file's format.
 * @param {Blob} file
 * @param {Uint8Array} bytes the file's bytes; may be changed in place.
 * @returns {{blob: Blob, orientation: number}} orientation 1 to 8; 1 is upright.
 */
export function prepare(format, file, bytes) {
  if (format === "PNG") return preparePng(file, bytes);
  if (format === "WebP") return prepareWebp(file, bytes);
  return { blob: file, orientation: 1 };
}

const STRIPPED_CHUNKS = ["eXIf", "acTL", "fcTL", "fdAT"];

function preparePng(file, bytes) {
  const parts = [bytes.subarray(0, 8)];
  let exif;
  let stripped = false;
  for (let at = 8, name = ""; at + 12 <= bytes.length && name !== "IEND"; ) {
    const length = view(bytes).getUint32(at);
    name = ascii(bytes, at + 4, at + 8);
    if (name === "eXIf") exif = bytes.subarray(at + 8, at + 8 + length);
    if (STRIPPED_CHUNKS.includes(name)) stripped = true;
    else parts.push(bytes.subarray(at, at + 12 + length));
    at += 12 + length;
  }
  return { blob: stripped ? new Blob(parts) : file, orientation: orientationOf(exif) };
}

function prepareWebp(file, bytes) {
  let exif;
  for (let at = 12; at + 8 <= bytes.length; ) {
    const length = view(bytes).getUint32(at + 4, true);
    const name = ascii(bytes, at, at + 4);
    if (name === "VP8X") bytes[at + 8] &= ~0x08; // the flag of EXIF data
    if (name === "EXIF") {
      exif ??= bytes.slice(at + 8, at + 8 + length);
      bytes.fill(0, at, at + 4); // a chunk name that browsers skip
    }
    at += 8 + length + (length % 2);
  }
  return { blob: exif ? new Blob([bytes]) : file, orientation: orientationOf(exif) };
}

/** Returns the orientation in EXIF data, which is a small TIFF file; 1 if there is none or the data is damaged. */
function orientationOf(exif) {
  if (!exif) return 1;
  if (ascii(exif, 0, 6) === "Exif\0\0") exif = exif.subarray(6);
  const [data, little] = [view(exif), ascii(exif, 0, 2) === "II"];
  try {
    const first = data.getUint32(4, little);
    for (let i = 0; i < data.getUint16(first, little); i++) {
      const entry = first + 2 + 12 * i;
      if (data.getUint16(entry, little) !== 0x0112) continue;
      const orientation = data.getUint16(entry + 8, little);
      return orientation >= 1 && orientation <= 8 ? orientation : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return 1;
}
