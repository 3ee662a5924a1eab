// The state of the page as a query string, and back.
//
// An image that was edited is not in the link. The link has the steps that made it (`step`, one query string each, with
// `pick=RUN:PLACE`), and the page draws them again. An uploaded image cannot be repeated: `upload=1` says so.

const NUMBERS = ["n", "seed", "candidates", "temperature", "top_k", "top_p", "guidance", "steps", "choice_temperature"];
const DEFAULTS = { n: 4, seed: 0, candidates: 0, temperature: 1, top_k: null, top_p: null, guidance: 0, steps: null,
  choice_temperature: null, guidance_schedule: null };

// One drawing: caption, negative, runs, the numbers above, method, and what the method needs.
export function toParams(drawing) {
  const params = new URLSearchParams();
  params.set("caption", drawing.caption);
  if (drawing.negative) params.set("negative", drawing.negative);
  for (const name of NUMBERS) if (drawing[name] !== DEFAULTS[name] && drawing[name] !== null) params.set(name, drawing[name]);
  if (drawing.guidance_schedule) params.set("guidance_schedule", drawing.guidance_schedule);
  for (const run of drawing.runs) params.append("run", run);
  if (drawing.method !== "generate") params.set("method", drawing.method);
  if (drawing.method === "inpaint" && drawing.mask) params.set("mask", `${drawing.mask.height}x${drawing.mask.width}-${drawing.mask.bits}`);
  if (drawing.method === "outpaint") params.set("pad", drawing.pad.join(","));
  if (drawing.method === "vary") params.set("strength", drawing.strength);
  if (drawing.method === "complete") params.set("rows", drawing.rows);
  return params;
}

export function fromParams(params) {
  const drawing = { ...DEFAULTS, caption: params.get("caption") ?? "", negative: params.get("negative") ?? "" };
  for (const name of NUMBERS) if (params.has(name)) drawing[name] = Number(params.get(name));
  drawing.guidance_schedule = params.get("guidance_schedule");
  drawing.runs = params.getAll("run");
  drawing.method = params.get("method") ?? "generate";
  const mask = /^(\d+)x(\d+)-([0-9a-f]*)$/.exec(params.get("mask") ?? "");
  drawing.mask = mask && { height: Number(mask[1]), width: Number(mask[2]), bits: mask[3] };
  drawing.pad = (params.get("pad") ?? "0,0,0,0").split(",").map(Number);
  drawing.strength = Number(params.get("strength") ?? 0.3);
  drawing.rows = Number(params.get("rows") ?? 0);
  return drawing;
}

// The whole state: the drawing, and the steps before it.
export function toQuery({ drawing, steps, upload }) {
  const params = toParams(drawing);
  for (const step of steps) {
    const inner = toParams(step.drawing);
    inner.set("pick", `${step.run}:${step.place}`);
    params.append("step", inner.toString());
  }
  if (upload) params.set("upload", "1");
  return params.toString();
}

export function fromQuery(query) {
  const params = new URLSearchParams(query);
  const steps = params.getAll("step").map((text) => {
    const inner = new URLSearchParams(text);
    const pick = inner.get("pick") ?? "";
    const colon = pick.lastIndexOf(":");
    return { drawing: fromParams(inner), run: pick.slice(0, colon), place: Number(pick.slice(colon + 1)) };
  });
  return { drawing: fromParams(params), steps, upload: params.has("upload") };
}
