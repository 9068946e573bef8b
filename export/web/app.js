/* The page: classifies images, shows the results, and switches between the model files. */

import { read, readJson, Unavailable } from "./files.js";
import { Network, readFile } from "./network.js";
import { decode, fit, Refused } from "./pixels.js";

// A run with at most so many classes has a bar for each of them. Otherwise the most probable ones have.
const ALL_CLASSES = 10;
const TOP_CLASSES = 5;
// Runs per image; their median time is shown.
const RUNS = 5;
// Longer side of a preview, in pixels.
const PREVIEW = 640;
// Shortest side of a preview, as a share of the longer one: a strip stays visible.
const THINNEST = 1 / 16;

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const status = (text) => ($("status").textContent = text);

let labels = [];
let resizing = {}; // of the run: resize, crop_pct, interpolation
let threshold = 0; // an answer is unsure if its highest probability is below it
let network = null;
const results = new Set(); // of {pixels, card, name, label}

// Tasks run one after another: loading a file deletes the network that an image would still be using.
let queue = Promise.resolve();
function enqueue(task, name = "") {
  $("results").setAttribute("aria-busy", "true");
  queue = queue.then(task).catch((error) => showError(name, `Something went wrong: ${error.message}`));
  const last = queue;
  queue.then(() => last === queue && $("results").removeAttribute("aria-busy"));
}

// === Images ===

function classifyFiles(files, messageIfNone) {
  if (!files.length) return status(messageIfNone);
  const total = files.length;
  let classified = 0;
  for (const file of files) {
    const name = file.name || "pasted image";
    enqueue(async () => {
      if (await classify(() => file, name)) classified++;
    }, name);
  }
  // A small screen shows only the last card.
  if (total > 1) enqueue(() => status(`${total} images: ${classified} classified, ${total - classified} failed`));
}

/**
 * @param readImage returns the image's file, or a promise of it.
 * @param {string} name the image's, for the card and the status.
 * @param {string} label the image's class, if it is known.
 * @returns {Promise<boolean>} whether it was classified.
 */
async function classify(readImage, name, label) {
  if (!network) {
    showError(name, "No model file is loaded. Choose one under Model file.");
    return false;
  }
  status(`Reading ${name} …`);
  let picture;
  let failure = "The image can't be read";
  try {
    picture = await decode(await readImage());
    const pixels = await fit(picture, network.height, network.width, resizing);
    const result = { pixels, name, label, card: createCard(picture, pixels, name) };
    failure = `${network.name}.tflite can't be run`;
    await runNetwork(result);
    results.add(result);
    show(result.card);
    return true;
  } catch (error) {
    // Anything else is the browser's own error, such as one about its memory.
    const isForUser = error instanceof Refused || error instanceof Unavailable;
    showError(name, isForUser ? error.message : `${failure}: ${error.message}`);
    return false;
  } finally {
    picture?.close();
  }
}

/** Runs the network on a result's pixels and updates its card. */
async function runNetwork(result) {
  const times = [];
  let probabilities;
  for (let i = 0; i < RUNS; i++) {
    const output = await network.run(result.pixels);
    probabilities = output.probabilities;
    times.push(output.milliseconds);
  }
  const median = times.sort((a, b) => a - b)[Math.floor(RUNS / 2)];
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const { card, label } = result;
  const top = labels[order[0]];
  card.querySelector("h3").textContent = top;
  const verdict = card.querySelector(".verdict");
  verdict.hidden = !labels.includes(label); // the data set may have renamed the class since the training
  verdict.textContent = top === label ? "✓ correct" : `✗ wrong: the label is ${label}`;
  verdict.classList.toggle("wrong", top !== label);
  const unsure = card.querySelector(".unsure");
  unsure.hidden = !(probabilities[order[0]] < threshold);
  unsure.textContent = `Unsure: the probability is below ${percent(threshold)}`;
  card.querySelector("ol").replaceChildren(
    ...order.slice(0, labels.length > ALL_CLASSES ? TOP_CLASSES : ALL_CLASSES).map((label) => {
      const bar = copy("bar");
      bar.querySelector(".name").textContent = labels[label];
      bar.querySelector(".share").textContent = percent(probabilities[label]);
      bar.querySelector(".track span").style.width = `${100 * probabilities[label]}%`;
      bar.dataset.probability = probabilities[label];
      return bar;
    }),
  );
  card.querySelector(".time").textContent = `${median.toFixed(2)} ms with ${network.name} (median of ${RUNS} runs)`;
  status(`${result.name}: ${top}, ${percent(probabilities[order[0]])}${unsure.hidden ? "" : ", unsure"}`);
}

/** Returns a card with both pictures and no classes yet. */
function createCard(picture, pixels, name) {
  const card = copy("result");
  const { height, width } = network;
  card.querySelector(".file").textContent = name;

  const original = card.querySelector(".original canvas");
  const longer = Math.max(picture.width, picture.height);
  const shrink = Math.min(1, PREVIEW / longer);
  const side = (pixels) => Math.max(1, Math.round(Math.max(pixels, longer * THINNEST) * shrink));
  [original.width, original.height] = [side(picture.width), side(picture.height)];
  const context = original.getContext("2d");
  context.imageSmoothingQuality = "high";
  picture.draw(context);
  original.ariaLabel = name;
  card.querySelector(".original figcaption").textContent = `${picture.width} × ${picture.height}`;
  const sameShape = picture.width * height === picture.height * width;
  const isCut = resizing.resize === "crop" && !(sameShape && resizing.crop_pct === 1);
  card.querySelector(".original").hidden = !isCut && sameShape && picture.width === width; // both would look the same

  const input = card.querySelector(".input canvas");
  [input.width, input.height] = [width, height];
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set([...pixels.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  input.getContext("2d").putImageData(image, 0, 0);
  const change = isCut ? ", the middle, as in training" : sameShape ? "" : ", stretched as in training";
  card.querySelector(".input figcaption").textContent = `Network input: ${width} × ${height}${change}`;
  return card;
}

/** Puts a card on top of the others. */
function show(card) {
  $("results").prepend(card);
  $("empty").hidden = true;
  $("clear").hidden = false;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  card.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

function showError(name, message) {
  const card = copy("error");
  card.querySelector(".file").textContent = name;
  card.querySelector(".message").textContent = message;
  show(card);
  status(name ? `${name}: ${message}` : message);
}

function copy(template) {
  return $(template).content.firstElementChild.cloneNode(true);
}

$("choose").addEventListener("change", (event) => {
  classifyFiles([...event.target.files], "No image was chosen.");
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => classifyFiles([...event.clipboardData.files], "The clipboard holds no image."));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault(); // the browser would open the image in place of the page
  $("drop").classList.remove("over");
  classifyFiles([...event.dataTransfer.files], "No file was dropped.");
});
$("clear").addEventListener("click", () => {
  enqueue(() => {
    results.clear();
    $("results").replaceChildren();
    $("empty").hidden = false;
    $("clear").hidden = true;
    status("Cleared.");
    $("choose").focus();
  });
});

// === Model files ===

async function loadModel(name) {
  status(`Loading ${name} …`);
  const previous = network;
  try {
    const file = await readFile(name); // before the old network is deleted: without the server the page keeps it
    network = null;
    previous?.delete();
    network = await Network.load(file);
  } catch (error) {
    showError(name, error.message);
    $(name).checked = false; // so that it can be chosen again
    if (!previous) return;
    network ??= await Network.load(previous.file);
    $(previous.name).checked = true;
    return;
  }
  for (const result of results) await runNetwork(result);
  if (!results.size) status(`${name} is ready.`);
}

function addModelChoice({ name, bytes }) {
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "artifact", id: name, value: name });
  const label = Object.assign(document.createElement("label"), { htmlFor: name });
  const size = Object.assign(document.createElement("span"), { textContent: `${(bytes / 1e6).toFixed(1)} MB` });
  label.append(name.replace("_", " "), size);
  input.addEventListener("change", () => enqueue(() => loadModel(name), name));
  $("artifacts").append(input, label);
}

// === Samples ===

async function showSamples() {
  const { labels: names, note } = await readJson("samples.json");
  $("sampled").hidden = !names.length;
  $("samples-note").textContent = note;
  // With a note the run may have trained on the images.
  const kind = note ? "image" : "test image";
  $("sampled-title").textContent = `Or try ${note ? "an" : "a"} ${kind}`;
  $("samples").replaceChildren(
    ...names.map((name, i) => {
      const path = `samples/${i}.png`;
      const title = `${kind}, labelled ${name}`;
      const item = document.createElement("li");
      const button = Object.assign(document.createElement("button"), { type: "button" });
      const caption = Object.assign(document.createElement("span"), { textContent: name });
      button.append(Object.assign(new Image(), { src: `/${path}`, alt: "" }), caption);
      button.addEventListener("click", () =>
        enqueue(() => classify(async () => new Blob([await read(path)]), title, name), title),
      );
      item.append(button);
      return item;
    }),
  );
}

status("Loading …"); // not in the HTML, where it would stay if JavaScript is off
enqueue(async () => {
  const run = await readJson("run.json");
  ({ labels, resizing, threshold } = run);
  run.artifacts.forEach(addModelChoice);
  const [first] = run.artifacts;
  $(first.name).checked = true;
  await loadModel(first.name);
});
showSamples().catch(() => {}); // the server prints why
