// The page: reads the form, draws, edits, saves, and keeps its state in the link.

import { call, values } from "./calls.js";
import { Editor } from "./editor.js";
import { fromQuery, toQuery } from "./link.js";
import { Panel } from "./panels.js";

const $ = (id) => document.getElementById(id);
const SLIDERS = ["n", "temperature", "guidance", "top_p", "strength", "rows"];
const MOST_SEED = 2 ** 32;
const narrow = window.matchMedia("(max-width: 860px)"); // as in page.css

let about; // the server's description of itself
let editor;
let current = null; // { abort } of the drawing that runs
let source = null; // the image to edit: { url, steps, upload }

// -- form ---------------------------------------------------------------------------------------------------------

const number = (id) => ($(id).value.trim() === "" ? null : Number($(id).value));
const chosenRuns = () => [...$("runs").querySelectorAll("input:checked")].map((box) => box.value);
const runsOf = (names) => about.runs.filter((run) => names.includes(run.name));

// Reads the form: one drawing, as in link.js.
function readForm() {
  const method = source ? editor.method : "generate";
  const able = runsOf(chosenRuns()).filter((run) => method === "generate" || run.edits.includes(method));
  return {
    caption: $("caption").value, negative: $("negative").value, n: number("n"), seed: number("seed"), candidates: number("candidates"),
    temperature: number("temperature"), top_k: number("top_k"), top_p: number("top_p") >= 1 ? null : number("top_p"),
    guidance: number("guidance"), guidance_schedule: $("guidance_schedule").value.trim() || null, steps: number("steps"), choice_temperature: number("choice_temperature"), runs: (able.length ? able.map((run) => run.name) : chosenRuns()), method,
    mask: editor.mask, pad: editor.pad, strength: number("strength"), rows: number("rows"),
  };
}

function writeForm(drawing) {
  $("caption").value = drawing.caption;
  $("negative").value = drawing.negative;
  for (const name of ["n", "seed", "temperature", "guidance"]) $(name).value = drawing[name];
  for (const name of ["top_k", "steps", "choice_temperature", "guidance_schedule"]) $(name).value = drawing[name] ?? "";
  $("top_p").value = drawing.top_p ?? 1;
  $("candidates").value = String(drawing.candidates);
  if ($("candidates").selectedIndex < 0) {
    $("candidates").append(new Option(`${drawing.candidates} candidates`, drawing.candidates));
    $("candidates").value = String(drawing.candidates);
  }
  for (const box of $("runs").querySelectorAll("input")) box.checked = !drawing.runs.length || drawing.runs.includes(box.value);
  if (!chosenRuns().length) for (const box of $("runs").querySelectorAll("input")) box.checked = true;
  $("strength").value = drawing.strength;
  showValues();
}

function showValues() {
  for (const id of SLIDERS) {
    const shown = document.querySelector(`output[for="${id}"]`);
    const value = $(id).value;
    shown.textContent = id === "top_p" && value >= 1 ? "off" : id === "strength" ? `${Math.round(100 * value)}%` : value;
  }
}

// Turns a drawing of link.js into the request of the server.
function toRequest(drawing, image) {
  const { caption, negative, n, seed, candidates, runs, method, mask, pad, strength, rows } = drawing;
  const { temperature, top_k, top_p, guidance, guidance_schedule, steps, choice_temperature } = drawing;
  return {
    caption, negative, n, seed, candidates, runs, method, mask, pad, strength, rows,
    sampling: { temperature, top_k, top_p, guidance, guidance_schedule, steps, choice_temperature },
    image: method === "generate" ? null : image,
  };
}

// -- drawing ------------------------------------------------------------------------------------------------------

function alertOf(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

async function draw(drawing) {
  if (drawing.method === "inpaint" && !drawing.mask) return alertOf("Mark the part of the image to draw again with the brush.");
  current?.abort();
  const mine = (current = new AbortController());
  const made = { drawing, steps: source?.steps ?? [], upload: source?.upload ?? false };
  const request = toRequest(drawing, source && base64(source.url));
  const panels = new Map();
  alertOf("");
  $("panels").replaceChildren();
  for (const run of runsOf(drawing.runs)) {
    panels.set(run.name, new Panel(run, drawing.n, { use: (panel, place) => use(panel, place, made), save: (...each) => save(...each, request) }));
    $("panels").append(panels.get(run.name).root);
  }
  $("status").textContent = "Waiting for its turn …";
  document.body.dataset.state = "drawing";
  history.replaceState(null, "", `?${toQuery(made)}`);
  $("link").hidden = false;
  if (narrow.matches) $("results").scrollIntoView({ behavior: "smooth" });
  try {
    for await (const event of values("draw", request, mine.signal)) {
      if (mine.signal.aborted) return;
      const panel = panels.get(event.run);
      if (event.kind === "run") $("status").textContent = `${event.run} draws …`;
      if (event.kind === "note") panel.note(event.text);
      if (event.kind === "frame") await panel.frame(event, drawing.candidates);
      if (event.kind === "images") await panel.done(event, drawing.caption);
      if (event.kind === "error" && panel) panel.error(event.text);
      if (event.kind === "error" && !panel) throw new Error(event.text);
    }
    $("status").textContent = [...panels.values()].some((panel) => panel.images.length) ? sentence(made) : "";
  } catch (error) {
    if (mine.signal.aborted) return;
    $("panels").replaceChildren();
    $("status").textContent = "";
    alertOf(error.message);
  }
  if (current !== mine) return;
  document.body.dataset.drawings = 1 + Number(document.body.dataset.drawings ?? 0); // finished ones
  document.body.dataset.state = "idle";
}

const EDITS = { inpaint: "Drawn again where it was marked", outpaint: "Extended", vary: "Varied", complete: "Drawn below the kept rows" };

function sentence({ drawing, steps }) {
  const kind = drawing.method === "generate" ? "Drawn" : EDITS[drawing.method];
  return `${kind} at seed ${drawing.seed}${steps.length > 1 ? `, after ${steps.length - 1} earlier ${steps.length > 2 ? "edits" : "edit"}` : ""}.`;
}

// -- edits --------------------------------------------------------------------------------------------------------

const base64 = (url) => url.slice(url.indexOf(",") + 1);

// Makes an image the input of edits.
function setSource(next) {
  source = next;
  $("empty").hidden = Boolean(next);
  $("chosen").hidden = !next;
  const run = runsOf(chosenRuns())[0] ?? about.runs[0];
  if (next) editor.show(next.url, run.grid, run.fit);
  chooseMethod(editor.method);
}

function use(panel, place, made) {
  const { drawing } = made;
  const step = { drawing: { ...drawing, runs: [panel.run.name] }, run: panel.run.name, place };
  setSource({ url: panel.images[place], steps: [...made.steps, step], upload: made.upload });
  $("edit").scrollIntoView({ behavior: "smooth", block: "nearest" });
}

function chooseMethod(wanted) {
  const runs = runsOf(chosenRuns());
  const can = (method) => runs.some((run) => run.edits.includes(method));
  const method = can(wanted) ? wanted : "complete";
  for (const tab of document.querySelectorAll(".tabs button")) {
    tab.disabled = !can(tab.dataset.method);
    tab.setAttribute("aria-pressed", tab.dataset.method === method);
  }
  for (const tools of document.querySelectorAll("[data-for]")) tools.hidden = tools.dataset.for !== method;
  editor.choose(method);
  $("draw").textContent = source ? { inpaint: "Draw again", outpaint: "Extend", vary: "Vary", complete: "Complete" }[method] : "Draw";
  const unable = runs.filter((run) => !run.edits.includes(method)).map((run) => run.name);
  const hint = { inpaint: "Paint what to draw again. The caption describes the whole image.", outpaint: "The caption describes the whole canvas.",
    vary: "A random share of the image is drawn again. The caption may be empty.", complete: "The shaded part is drawn again." }[method];
  $("hint").textContent = unable.length ? `${hint} ${unable.join(", ")} draws from top to bottom and cannot do this.` : hint;
  showValues();
}

function upload(file) {
  if (!file) return;
  if (file.size > about.most.bytes) return alertOf(`${file.name} has more than ${about.most.bytes / 2 ** 20} MiB. Make it smaller first.`);
  const reader = new FileReader();
  reader.onload = () => {
    alertOf("");
    setSource({ url: reader.result, steps: [], upload: true });
  };
  reader.onerror = () => alertOf(`${file.name} cannot be read.`);
  reader.readAsDataURL(file);
}

// -- saving -------------------------------------------------------------------------------------------------------

async function save(panel, place, button, request) {
  button.disabled = true;
  try {
    const score = panel.scores ? panel.scores[place] : null;
    const answer = await call("save", {
      request: { ...request, runs: [panel.run.name] }, number: panel.numbers[place], score, image: base64(panel.images[place]),
    });
    if (answer.error) throw new Error(answer.error);
    const name = request.caption.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "image";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([Uint8Array.from(atob(answer.zip), (each) => each.charCodeAt(0))], { type: "application/zip" }));
    link.download = `${name}-seed${request.seed}-${panel.numbers[place]}.zip`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    panel.error(error.message);
  }
  button.disabled = false;
}

// -- start --------------------------------------------------------------------------------------------------------

// Draws the steps of a link again, so that the image that it edits is there.
async function replay(steps) {
  let image = null;
  for (const [place, step] of steps.entries()) {
    $("status").textContent = `Drawing step ${place + 1} of ${steps.length} of the link …`;
    let found = null;
    for await (const event of values("draw", toRequest(step.drawing, image))) {
      if (event.kind === "images") found = event.images[step.place];
      if (event.kind === "error") throw new Error(event.text);
    }
    if (!found) throw new Error(`The link edits image ${step.place + 1} of ${step.run}, which is not there.`);
    image = base64(found);
  }
  return image && `data:image/png;base64,${image}`;
}

async function openLink() {
  const { drawing, steps, upload } = fromQuery(location.search);
  if (!location.search) {
    drawing.caption = about.captions[0] ?? "";
    drawing.candidates = about.candidates;
  }
  writeForm(drawing);
  chooseMethod(drawing.method === "generate" ? editor.method : drawing.method);
  if (!location.search || !(drawing.caption || drawing.method === "vary")) return;
  drawing.runs = chosenRuns();
  if (upload) return alertOf("This link began with an uploaded image. Upload it to repeat the edit.");
  if (drawing.method !== "generate") {
    setSource({ url: await replay(steps), steps, upload: false });
    chooseMethod(drawing.method);
    editor.mask = drawing.mask;
    editor.extend(drawing.pad);
    $("rows").value = drawing.rows;
    showValues();
    editor.paint();
  }
  await draw(drawing);
}

function addChips() {
  for (const run of about.runs) {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", className: "unseen", value: run.name, checked: true });
    box.addEventListener("change", () => {
      if (!chosenRuns().length) box.checked = true;
      chooseMethod(editor.method);
    });
    label.title = run.about;
    label.append(box, run.name);
    $("runs").append(label);
  }
  $("runs").hidden = about.runs.length < 2;
  $("examples").hidden = !about.captions.length;
  if (!about.captions.length) $("welcome").textContent = "Write a caption. Images appear here while they are drawn.";
  for (const caption of about.captions) {
    const chip = Object.assign(document.createElement("button"), { type: "button", textContent: caption, title: caption });
    chip.addEventListener("click", () => {
      $("caption").value = caption;
      $("ask").requestSubmit();
    });
    $("examples").append(chip);
  }
}

async function start() {
  about = await (await fetch("page/about")).json();
  $("device").textContent = about.device;
  $("caption").maxLength = about.most.characters;
  $("n").max = about.most.images;
  for (let count = 4; count <= about.most.candidates; count *= 2) $("candidates").append(new Option(`${count} candidates`, count));
  $("candidates").disabled = !about.runs.some((run) => run.clip);
  addChips();
  const facts = [
    about.runs.some((run) => run.clip) ? "“Best of” draws candidates, and CLIP keeps the ones that fit the caption." : "No CLIP was loaded, so candidates cannot be ranked.",
    about.runs.every((run) => run.takesSteps) ? "" : "Steps and choice are for MaskGIT. An autoregressive prior draws one token after another.",
  ];
  $("notes").textContent = facts.filter(Boolean).join(" ");
  const takes = about.runs.find((run) => run.takesSteps);
  $("steps").disabled = !takes;
  const maskgit = about.runs.find((run) => run.choice !== null);
  $("choice_temperature").disabled = !maskgit;
  $("choice_temperature").placeholder = maskgit ? `default, ${maskgit.choice}` : "of MaskGIT";
  $("steps").placeholder = takes ? `default, ${takes.steps}` : "one for each token";

  editor = new Editor(() => {});
  for (const id of SLIDERS) $(id).addEventListener("input", showValues);
  for (const tab of document.querySelectorAll(".tabs button")) tab.addEventListener("click", () => chooseMethod(tab.dataset.method));
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    draw(readForm());
  });
  $("caption").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("dice").addEventListener("click", () => {
    $("seed").value = Math.floor(Math.random() * MOST_SEED);
    $("ask").requestSubmit();
  });
  $("remove").addEventListener("click", () => setSource(null));
  $("upload").addEventListener("change", (event) => upload(event.target.files[0]));
  $("edit").addEventListener("dragover", (event) => {
    event.preventDefault();
    $("edit").classList.add("over");
  });
  $("edit").addEventListener("dragleave", () => $("edit").classList.remove("over"));
  $("edit").addEventListener("drop", (event) => {
    event.preventDefault();
    $("edit").classList.remove("over");
    upload(event.dataTransfer.files[0]);
  });
  $("link").addEventListener("click", async () => {
    await navigator.clipboard?.writeText(location.href).catch(() => {});
    $("link").textContent = "Copied";
    setTimeout(() => ($("link").textContent = "Copy link"), 1500);
  });
  if (narrow.matches) $("settings").open = false;
  document.body.dataset.state = "idle";
  await openLink();
}

start().catch((error) => {
  alertOf(error.message);
  document.body.dataset.state = "idle";
});
