/* The page: images in, answers out. */

import { read, readJson, Unavailable } from "./files.js";
import { Network, readFile } from "./network.js";
import { decode, Refused, stretch } from "./pixels.js";

// Every class, if there are so many at most; else the most probable of them.
const ALL_CLASSES = 10;
const TOP_CLASSES = 5;
// Of one image, for the median of the time.
const RUNS = 5;
// Longer side of a preview, in pixels.
const PREVIEW = 640;
// Its shorter side is drawn as at least this share of the longer one, so that a strip can be seen.
const THINNEST = 1 / 16;

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const status = (text) => ($("status").textContent = text);

let labels = [];
let network = null;
const answers = new Set(); // of {pixels, card, name, label}

// One thing at a time: a file that is loaded while an image is classified would pull the network from under it.
let work = Promise.resolve();
function then(task, name = "") {
  $("answers").setAttribute("aria-busy", "true");
  work = work.then(task).catch((error) => trouble(name, `Something went wrong: ${error.message}`));
  const last = work;
  work.then(() => last === work && $("answers").removeAttribute("aria-busy"));
}

// === Images ===

function take(files, without) {
  if (!files.length) return status(without);
  const all = files.length;
  let answered = 0;
  for (const file of files) {
    const name = file.name || "pasted image";
    then(async () => {
      if (await classify(() => file, name)) answered++;
    }, name);
  }
  // A small screen has no more than the last of them in view.
  if (all > 1) then(() => status(`${all} images: ${answered} answered, ${all - answered} failed`));
}

/**
 * @param give returns the image's file, or a promise of it.
 * @param {string} label what the image shows, where that is known.
 * @returns {Promise<boolean>} whether there is an answer.
 */
async function classify(give, name, label) {
  if (!network) {
    trouble(name, "No model file is loaded: choose one that can be.");
    return false;
  }
  status(`Reading ${name} …`);
  let picture;
  let failing = "The image can't be read";
  try {
    picture = await decode(await give());
    const pixels = await stretch(picture, network.size);
    const answer = { pixels, name, label, card: draw(picture, pixels, name) };
    failing = `${network.name}.tflite can't be run`;
    await ask(answer);
    answers.add(answer);
    show(answer.card);
    return true;
  } catch (error) {
    // A browser that runs out of memory says so in many ways.
    const told = error instanceof Refused || error instanceof Unavailable;
    trouble(name, told ? error.message : `${failing}: ${error.message}`);
    return false;
  } finally {
    picture?.close();
  }
}

/** Runs the network on an answer's pixels and writes what it says into the card. */
async function ask(answer) {
  const times = [];
  let probabilities;
  for (let i = 0; i < RUNS; i++) {
    const found = await network.run(answer.pixels);
    probabilities = found.probabilities;
    times.push(found.milliseconds);
  }
  const median = times.sort((a, b) => a - b)[Math.floor(RUNS / 2)];
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const { card, label } = answer;
  const top = labels[order[0]];
  card.querySelector("h3").textContent = top;
  const mark = card.querySelector(".mark");
  mark.hidden = !labels.includes(label); // the data set may have come to call it otherwise
  mark.textContent = top === label ? "✓ right" : `✗ wrong, it is labelled ${label}`;
  mark.classList.toggle("wrong", top !== label);
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
  card.querySelector(".cost").textContent = `${median.toFixed(2)} ms with ${network.name}, the median of ${RUNS} runs`;
  status(`${answer.name}: ${top}, ${percent(probabilities[order[0]])}`);
}

/** A card with both pictures, without an answer yet. */
function draw(picture, pixels, name) {
  const card = copy("answer");
  const { size } = network;
  const same = picture.width === size && picture.height === size;
  card.querySelector(".file").textContent = name;

  const given = card.querySelector(".given canvas");
  const longer = Math.max(picture.width, picture.height);
  const shrink = Math.min(1, PREVIEW / longer);
  const side = (pixels) => Math.max(1, Math.round(Math.max(pixels, longer * THINNEST) * shrink));
  [given.width, given.height] = [side(picture.width), side(picture.height)];
  const context = given.getContext("2d");
  context.imageSmoothingQuality = "high";
  picture.draw(context);
  given.ariaLabel = name;
  card.querySelector(".given figcaption").textContent = `${picture.width} × ${picture.height}`;
  card.querySelector(".given").hidden = same; // one of the two is enough

  const seen = card.querySelector(".seen canvas");
  seen.width = seen.height = size;
  const image = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) image.data.set([...pixels.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  seen.getContext("2d").putImageData(image, 0, 0);
  const stretched = picture.width === picture.height ? "" : ", stretched as in training";
  card.querySelector(".seen figcaption").textContent = `what the network sees: ${size} × ${size}${stretched}`;
  return card;
}

/** Puts a card on top of the others. */
function show(card) {
  $("answers").prepend(card);
  $("none").hidden = true;
  $("clear").hidden = false;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  card.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

function trouble(name, why) {
  const card = copy("trouble");
  card.querySelector(".file").textContent = name;
  card.querySelector(".why").textContent = why;
  show(card);
  status(name ? `${name}: ${why}` : why);
}

function copy(template) {
  return $(template).content.firstElementChild.cloneNode(true);
}

$("choose").addEventListener("change", (event) => {
  take([...event.target.files], "No image was chosen.");
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files], "There is no image to paste."));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault(); // the browser would leave the page for the image
  $("drop").classList.remove("over");
  take([...event.dataTransfer.files], "What was dropped is no file.");
});
$("clear").addEventListener("click", () => {
  then(() => {
    answers.clear();
    $("answers").replaceChildren();
    $("none").hidden = false;
    $("clear").hidden = true;
    status("Cleared.");
    $("choose").focus();
  });
});

// === Model files ===

async function use(name) {
  status(`Loading ${name} …`);
  const before = network;
  try {
    const file = await readFile(name); // first: while the server is away, what there is goes on
    network = null;
    before?.delete();
    network = await Network.load(file);
  } catch (error) {
    trouble(name, error.message);
    $(name).checked = false; // so that it can be chosen again
    if (!before) return;
    network ??= await Network.load(before.file);
    $(before.name).checked = true;
    return;
  }
  for (const answer of answers) await ask(answer);
  if (!answers.size) status(`${name} is ready.`);
}

function offer({ name, bytes }) {
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "artifact", id: name, value: name });
  const label = Object.assign(document.createElement("label"), { htmlFor: name });
  const size = Object.assign(document.createElement("span"), { textContent: `${(bytes / 1e6).toFixed(1)} MB` });
  label.append(name.replace("_", " "), size);
  input.addEventListener("change", () => then(() => use(name), name));
  $("artifacts").append(input, label);
}

// === Samples ===

async function offerSamples() {
  const { labels: names, note } = await readJson("samples.json");
  $("sampled").hidden = !names.length;
  $("samples-note").textContent = note;
  const kind = note ? "image" : "test image"; // which a note casts doubt on
  $("sampled-title").textContent = `Or take ${note ? "an" : "a"} ${kind}`;
  $("samples").replaceChildren(
    ...names.map((name, i) => {
      const path = `samples/${i}.png`;
      const title = `${kind}, labelled ${name}`;
      const item = document.createElement("li");
      const button = Object.assign(document.createElement("button"), { type: "button" });
      const caption = Object.assign(document.createElement("span"), { textContent: name });
      button.append(Object.assign(new Image(), { src: `/${path}`, alt: "" }), caption);
      button.addEventListener("click", () =>
        then(() => classify(async () => new Blob([await read(path)]), title, name), title),
      );
      item.append(button);
      return item;
    }),
  );
}

status("Loading …"); // which without JavaScript would be no news
then(async () => {
  const run = await readJson("run.json");
  labels = run.labels;
  run.artifacts.forEach(offer);
  const [first] = run.artifacts;
  $(first.name).checked = true;
  await use(first.name);
});
offerSamples().catch(() => {}); // the server has said why
