// The results: one panel for each run, with its tiles. All text is set as text, never as HTML.

const PACE = 70; // milliseconds between frames, so that the drawing of a fast model can be seen
const SHARP = 128; // pixels; smaller images are enlarged without smoothing
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
const copy = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

export class Panel {
  constructor(run, count, actions) {
    Object.assign(this, { run, actions, shown: 0, images: [] });
    this.root = copy("panel");
    this.root.dataset.run = run.name;
    this.root.querySelector("h2").textContent = run.name;
    this.root.querySelector("h2").title = run.about;
    this.root.classList.add("waiting");
    this.root.classList.toggle("few", count <= 4);
    this.meta(run.prior === "maskgit" ? "MaskGIT" : "autoregressive");
    this.tiles = Array.from({ length: count }, (_, place) => {
      const tile = copy("tile");
      tile.querySelector(".use").addEventListener("click", () => actions.use(this, place));
      tile.querySelector(".save").addEventListener("click", (event) => actions.save(this, place, event.target));
      this.root.querySelector(".tiles").append(tile);
      return tile;
    });
  }

  meta(text) {
    this.root.querySelector(".meta").textContent = text;
  }

  note(text) {
    const note = this.root.querySelector(".note");
    note.textContent = text;
    note.hidden = !text;
  }

  async frame({ images, progress, first, count }, candidates) {
    const wait = this.shown + PACE - performance.now();
    if (wait > 0 && !still.matches) await new Promise((done) => setTimeout(done, wait));
    this.shown = performance.now();
    if (candidates) this.meta(`candidates ${first + 1} to ${first + count} of ${candidates}`);
    this.progress(candidates ? (first + count * progress) / candidates : progress);
    await this.put(images);
  }

  progress(share) {
    this.root.classList.remove("waiting");
    this.root.querySelector(".bar i").style.width = `${100 * Math.min(share, 1)}%`;
  }

  // Shows images at the tiles. Waits until they are decoded, so that nothing flickers.
  async put(images) {
    await Promise.all(
      images.map(async (source, place) => {
        const image = this.tiles[place]?.querySelector("img");
        if (!image) return;
        image.src = source;
        await image.decode().catch(() => {});
        image.classList.toggle("crisp", Math.max(image.naturalWidth, image.naturalHeight) <= SHARP);
      }),
    );
  }

  async done(event, caption) {
    Object.assign(this, { images: event.images, numbers: event.numbers, scores: event.scores });
    await this.frame({ images: event.images, progress: 1, first: 0 }, 0);
    if (event.compiled) this.note("");
    this.root.classList.add("done");
    this.tiles.forEach((tile, place) => {
      const image = tile.querySelector("img");
      image.alt = caption;
      if (image.naturalWidth) image.parentElement.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`;
      tile.querySelector(".score").textContent = event.scores ? event.scores[place].toFixed(2) : "";
    });
    const all = `${event.drawn} ${event.drawn === 1 ? "image" : "images"} in ${seconds(event.seconds)}`;
    const each = event.compiled ? "with compiling once" : `${seconds(event.seconds / event.drawn)} per image`;
    this.meta(`${all}, ${each} · ${event.steps} steps`);
  }

  error(text) {
    this.root.classList.remove("waiting");
    this.note("");
    this.root.classList.add("failed");
    const error = this.root.querySelector(".error");
    error.textContent = text;
    error.hidden = false;
    if (!this.images.length) this.root.querySelector(".tiles").replaceChildren();
  }
}

export function seconds(value) {
  return value < 0.01 ? `${(1000 * value).toFixed(1)} ms` : `${value < 1 ? value.toFixed(2) : value.toFixed(1)} s`;
}
