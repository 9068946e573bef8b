/* A run's .tflite files, run by LiteRT in WebAssembly on one thread. */

import { loadAndCompile, loadLiteRt, Tensor, unloadLiteRt } from "@litertjs/core";
import { read } from "./files.js";

const WASM = "/node_modules/@litertjs/core/wasm/";
// Runs before the first that counts: a browser goes on compiling while what it has compiled in haste runs.
const WARM_UP = 5;
let runtime;
let said = ""; // by the runtime, of what went wrong last

/**
 * A file for `Network.load`.
 *
 * @param {string} name of the artifact, `float32` and so on.
 * @returns {Promise<{name: string, bytes: Uint8Array, quantization: {scale: number, zeroPoint: number}}>}
 * @throws {Error} if it can't be had or is no TFLite file; the message is for the user.
 */
export async function readFile(name) {
  const bytes = await read(`${name}.tflite`);
  try {
    return { name, bytes, quantization: outputQuantization(bytes) };
  } catch (error) {
    const why = error instanceof RangeError ? "it is cut off or damaged" : error.message;
    throw new Error(`${name}.tflite can't be run: ${why}`);
  }
}

export class Network {
  /**
   * Only one is there at a time: where this fails, it takes the runtime with it.
   *
   * @param file what `readFile` gives.
   * @throws {Error} if it can't be run; the message is for the user.
   */
  static async load(file) {
    said = "";
    try {
      await (runtime ??= start());
      const network = new Network(file, await loadAndCompile(file.bytes, { accelerator: "wasm" }));
      for (let i = 0; i < WARM_UP; i++) await network.run(new Uint8Array(network.size ** 2 * 3));
      return network;
    } catch (error) {
      const why = said || String(error?.message ?? error).split("\n")[0];
      reset();
      throw new Error(`${file.name}.tflite can't be run: ${why}`);
    }
  }

  constructor(file, model) {
    this.file = file;
    this.name = file.name;
    this.model = model;
    /** Side of the square that it sees, in pixels. */
    this.size = model.getInputDetails()[0].shape[1];
  }

  /**
   * @param {Uint8Array} pixels `(size, size, 3)`.
   * @returns {Promise<{probabilities: number[], milliseconds: number}>} in the order of the labels, and the time from pixels to
   *   numbers.
   */
  async run(pixels) {
    const started = performance.now();
    const input = new Tensor(pixels, [1, this.size, this.size, 3]);
    try {
      const [output] = await this.model.run(input);
      const values = output.toTypedArray();
      output.delete();
      const milliseconds = performance.now() - started;
      return { probabilities: Array.from(values, (value) => this.real(value)), milliseconds };
    } finally {
      input.delete();
    }
  }

  real(value) {
    const { scale, zeroPoint } = this.file.quantization;
    return scale ? (value - zeroPoint) * scale : value;
  }

  delete() {
    this.model.delete();
  }
}

function start() {
  // It would write its notes to the console as errors.
  globalThis.Module = {
    printErr: (line) => {
      if (line.startsWith("ERROR: ")) said ||= line.replace(/^ERROR: (\[[^\]]*\] *)?/, "");
      console.debug(line);
    },
  };
  return loadLiteRt(WASM);
}

/** What a broken file leaves of the runtime may be broken too: the next file gets a new one. */
function reset() {
  runtime = undefined;
  try {
    unloadLiteRt();
  } catch {
    // It was not loaded.
  }
}

/**
 * Scale and zero point of a file's output, which the runtime does not tell; both 0 where it is float. Read by the schema of
 * TFLite's files, a FlatBuffer.
 *
 * @throws {RangeError} if the file is cut off.
 */
function outputQuantization(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8 || view.getUint32(4) !== 0x54464c33) throw new Error("it is no TFLite file"); // "TFL3"
  const follow = (at) => at + view.getUint32(at, true);
  const field = (table, slot) => {
    const slots = table - view.getInt32(table, true);
    const at = 4 + 2 * slot < view.getUint16(slots, true) ? view.getUint16(slots + 4 + 2 * slot, true) : 0;
    return at ? table + at : null;
  };
  const vector = (table, slot) => {
    const at = field(table, slot);
    return at && follow(at) + 4;
  };
  const graph = follow(vector(follow(0), 2)); // Model.subgraphs[0]
  const output = view.getInt32(vector(graph, 2), true); // .outputs[0]
  const tensor = follow(vector(graph, 0) + 4 * output); // .tensors[output]
  const found = field(tensor, 4); // .quantization
  const [scale, zeroPoint] = found ? [vector(follow(found), 2), vector(follow(found), 3)] : [null, null];
  if (!scale || !view.getUint32(scale - 4, true)) return { scale: 0, zeroPoint: 0 };
  return { scale: view.getFloat32(scale, true), zeroPoint: Number(view.getBigInt64(zeroPoint, true)) };
}
