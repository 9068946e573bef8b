/* Reads files from the server. */

/** A file that can't be read from the server. Its message is for the user. */
export class Unavailable extends Error {}

/**
 * @param {string} path on the server, without a leading slash.
 * @returns {Promise<Uint8Array>} the file's bytes.
 * @throws {Unavailable}
 */
export async function read(path) {
  let response, bytes;
  try {
    response = await fetch(`/${path}`);
    bytes = new Uint8Array(await response.arrayBuffer());
  } catch {
    throw new Unavailable(`${path} can't be loaded: the server does not answer. Is it still running?`);
  }
  const reason = response.status === 404 ? "the file no longer exists" : `status ${response.status}`;
  if (!response.ok) throw new Unavailable(`${path} can't be loaded: ${reason}.`);
  return bytes;
}

/** Like `read`, for a JSON file. Returns its value. */
export async function readJson(path) {
  return JSON.parse(new TextDecoder().decode(await read(path)));
}
