/* Runs a .tflite file with LiteRT in WebAssembly, on one thread. */

import { loadAndCompile, loadLiteRt, Tensor, unloadLiteRt } from "@litertjs/core";
import { read } from "./files.js";

const WASM = "/node_modules/@litertjs/core/wasm/";
// Runs before the first timed one: the browser optimises WebAssembly while it already runs.
const WARM_UP = 5;
let runtime;
let runtimeError = ""; // the first error that the runtime printed while loading or running

/**
 * Reads a file for `Network.load`.
 *
 * @param {string} name the artifact's, such as `float32`.
 * @returns {Promise<{name: string, bytes: Uint8Array, quantization: {scale: number, zeroPoint: number}}>}
 * @throws {Error} if it can't be read or is not a TFLite file; the message is for the user.
 */
export async function readFile(name) {
  const bytes = await read(`${name}.tflite`);
  try {
    return { name, bytes, quantization: outputQuantization(bytes) };
  } catch (error) {
    const reason = error instanceof RangeError ? "it is cut off or damaged" : error.message;
    throw new Error(`${name}.tflite can't be run: ${reason}`);
  }
}

export class Network {
  /**
   * Load one network at a time: a failure unloads the runtime, and with it every other network.
   *
   * @param file the result of `readFile`.
   * @throws {Error} if it can't be run; the message is for the user.
   */
  static async load(file) {
    runtimeError = "";
    try {
      await (runtime ??= start());
      const network = new Network(file, await loadAndCompile(file.bytes, { accelerator: "wasm" }));
      for (let i = 0; i < WARM_UP; i++) await network.run(new Uint8Array(network.height * network.width * 3));
      return network;
    } catch (error) {
      const reason = runtimeError || String(error?.message ?? error).split("\n")[0];
      reset();
      throw new Error(`${file.name}.tflite can't be run: ${reason}`);
    }
  }

  constructor(file, model) {
    this.file = file;
    this.name = file.name;
    this.model = model;
    /** Size of its input, in pixels. */
    [, this.height, this.width] = model.getInputDetails()[0].shape;
  }

  /**
   * @param {Uint8Array} pixels `(height, width, 3)`.
   * @returns {Promise<{probabilities: number[], milliseconds: number}>} probabilities in the order of the labels; the time
   *   from pixels to output.
   * @throws {Error} if the runtime fails, for lack of memory for example.
   */
  async run(pixels) {
    runtimeError = "";
    const started = performance.now();
    const input = new Tensor(pixels, [1, this.height, this.width, 3]);
    try {
      const [output] = await this.model.run(input);
      const values = output.toTypedArray();
      output.delete();
      if (runtimeError) throw new Error(runtimeError); // the runtime prints it and returns an output of any values
      const milliseconds = performance.now() - started;
      return { probabilities: Array.from(values, (value) => this.dequantize(value)), milliseconds };
    } finally {
      input.delete();
    }
  }

  dequantize(value) {
    const { scale, zeroPoint } = this.file.quantization;
    return scale ? (value - zeroPoint) * scale : value;
  }

  delete() {
    this.model.delete();
  }
}

function start() {
  // By default the runtime prints its notes to the console as errors.
  globalThis.Module = {
    printErr: (line) => {
      if (line.startsWith("ERROR: ")) runtimeError ||= line.replace(/^ERROR: (\[[^\]]*\] *)?/, "");
      console.debug(line);
    },
  };
  return loadLiteRt(WASM);
}

/** Unloads the runtime, which a damaged file may have left in a broken state. The next file starts a new one. */
function reset() {
  runtime = undefined;
  try {
    unloadLiteRt();
  } catch {
    // It was never loaded.
  }
}

/**
 * Returns the scale and zero point of a file's output; both 0 if it is float. The runtime does not report them, so this reads
 * the FlatBuffer.
 *
 * @throws {RangeError} if the file is cut off.
 */
function outputQuantization(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8 || view.getUint32(4) !== 0x54464c33) throw new Error("it is not a TFLite file"); // "TFL3"
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
  const quantization = field(tensor, 4); // .quantization
  const parameters = quantization && follow(quantization);
  const [scale, zeroPoint] = parameters ? [vector(parameters, 2), vector(parameters, 3)] : [null, null];
  if (!scale || !view.getUint32(scale - 4, true)) return { scale: 0, zeroPoint: 0 };
  return { scale: view.getFloat32(scale, true), zeroPoint: Number(view.getBigInt64(zeroPoint, true)) };
}
