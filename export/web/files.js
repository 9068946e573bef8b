/* What the server has. */

/** What can't be had. Its message is for the user. */
export class Unavailable extends Error {}

/**
 * @param {string} path of the server's, without the slash at its beginning.
 * @returns {Promise<Uint8Array>} the whole of what lies there.
 * @throws {Unavailable}
 */
export async function read(path) {
  let response, bytes;
  try {
    response = await fetch(`/${path}`);
    bytes = new Uint8Array(await response.arrayBuffer());
  } catch {
    throw new Unavailable(`${path} can't be had: the server does not answer. Is it still running?`);
  }
  const why = response.status === 404 ? "it is not there any more" : response.status;
  if (!response.ok) throw new Unavailable(`${path} can't be had: ${why}.`);
  return bytes;
}

/** What lies there as JSON; as `read`. */
export async function readJson(path) {
  return JSON.parse(new TextDecoder().decode(await read(path)));
}
