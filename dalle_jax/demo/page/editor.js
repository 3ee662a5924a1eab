// The image to edit: a brush marks cells of the token grid, handles extend the canvas.

const $ = (id) => document.getElementById(id);
const SIDES = ["top", "bottom", "left", "right"];

export class Editor {
  constructor(changed) {
    Object.assign(this, { changed, source: null, method: "inpaint", height: 8, width: 8, pad: [0, 0, 0, 0], erasing: false, last: null });
    this.marked = new Uint8Array(64);
    this.board = $("board");
    this.canvas = $("cells");
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (this.last = null));
    for (const handle of this.board.querySelectorAll(".handle")) this.drag(handle);
    $("erase").addEventListener("click", () => this.erase(!this.erasing));
    $("all").addEventListener("click", () => this.fill(1));
    $("clear").addEventListener("click", () => this.fill(0));
    $("unextend").addEventListener("click", () => this.extend([0, 0, 0, 0]));
    $("rows").addEventListener("input", () => this.paint());
    new ResizeObserver(() => this.layout()).observe($("stage"));
  }

  // Shows an image, or none, over a token grid.
  show(source, grid, fit) {
    this.source = source;
    $("input").style.objectFit = fit === "pad" ? "contain" : "cover";
    if (source) $("input").src = source;
    else $("input").removeAttribute("src");
    if (grid[0] !== this.height || grid[1] !== this.width || this.marked.length !== grid[0] * grid[1]) {
      [this.height, this.width] = grid;
      this.marked = new Uint8Array(this.height * this.width);
      $("rows").max = this.height;
      $("rows").value = this.height / 2;
    } else {
      this.marked.fill(0);
    }
    this.pad = [0, 0, 0, 0];
    this.layout();
  }

  choose(method) {
    this.method = method;
    this.board.dataset.method = method;
    this.layout();
  }

  // The most cells that the canvas may grow by: at the top and bottom, and at the left and right.
  get world() {
    return this.method === "outpaint" ? [Math.floor(this.height / 2), Math.floor(this.width / 2)] : [0, 0];
  }

  // Lays the board out. The canvas of an extension may be twice as high and as wide as the image.
  layout() {
    const space = $("stage").clientWidth;
    if (!space) return;
    const scale = this.method === "outpaint" ? 2 : 1;
    this.cell = Math.min(space, 360) / (Math.max(this.height, this.width) * scale);
    const [margin, side] = this.world.map((cells) => cells * this.cell);
    const [height, width] = [this.height * this.cell, this.width * this.cell];
    Object.assign(this.board.style, { height: `${height + 2 * margin}px`, width: `${width + 2 * side}px` });
    Object.assign($("input").style, { left: `${side}px`, top: `${margin}px`, width: `${width}px`, height: `${height}px` });
    $("input").classList.toggle("crisp", $("input").naturalWidth <= 128);
    this.paint();
  }

  paint() {
    const ratio = window.devicePixelRatio || 1;
    const box = [this.board.clientWidth, this.board.clientHeight];
    [this.canvas.width, this.canvas.height] = box.map((length) => Math.round(length * ratio));
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const accent = getComputedStyle(document.body).getPropertyValue("--accent");
    const [margin, side] = this.world.map((cells) => cells * this.cell);
    pen.fillStyle = pen.strokeStyle = accent;
    if (this.method === "outpaint") {
      const [top, bottom, left, right] = this.pad.map((cells) => cells * this.cell);
      const [height, width] = [this.height * this.cell, this.width * this.cell];
      const frame = [side - left, margin - top, width + left + right, height + top + bottom];
      pen.globalAlpha = 0.22;
      pen.beginPath();
      pen.rect(...frame);
      pen.rect(side, margin, width, height);
      pen.fill("evenodd");
      pen.globalAlpha = 1;
      pen.setLineDash([5, 4]);
      pen.strokeRect(frame[0] + 0.5, frame[1] + 0.5, frame[2] - 1, frame[3] - 1);
      const middle = { top: [side + width / 2, margin - top], bottom: [side + width / 2, margin + height + bottom],
        left: [side - left, margin + height / 2], right: [side + width + right, margin + height / 2] };
      for (const handle of this.board.querySelectorAll(".handle")) {
        const [x, y] = middle[handle.dataset.side];
        handle.style.left = `${Math.min(Math.max(x, 13), box[0] - 13)}px`;
        handle.style.top = `${Math.min(Math.max(y, 13), box[1] - 13)}px`;
      }
      const [t, b, l, r] = this.pad;
      $("extent").textContent = t + b + l + r ? `${this.width + l + r} × ${this.height + t + b} cells` : "Drag a handle outwards.";
      return;
    }
    const drawn = this.method === "complete" ? (y) => y >= Number($("rows").value) : (y, x) => this.marked[y * this.width + x];
    if (this.method === "vary") return;
    for (let y = 0; y < this.height; y++) {
      for (let x = 0; x < this.width; x++) {
        if (!drawn(y, x)) continue;
        pen.globalAlpha = 0.55;
        pen.fillRect(x * this.cell, y * this.cell, this.cell, this.cell);
      }
    }
    if (this.method === "inpaint" && this.cell >= 8) {
      pen.globalAlpha = 0.18;
      pen.beginPath();
      for (let x = 1; x < this.width; x++) pen.rect(x * this.cell, 0, 0.5, box[1]);
      for (let y = 1; y < this.height; y++) pen.rect(0, y * this.cell, box[0], 0.5);
      pen.fill();
    }
  }

  // -- brush

  press(event) {
    if (this.method !== "inpaint") return;
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.at(event);
    this.stroke(this.last);
  }

  move(event) {
    if (this.last) this.stroke(this.at(event));
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientY - box.top) / this.cell, (event.clientX - box.left) / this.cell];
  }

  // Marks the cells along a line, within the brush's width.
  stroke(to) {
    const [y0, x0] = this.last;
    const size = Number($("brush").value);
    const count = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - y0, to[1] - x0)));
    for (let i = 0; i <= count; i++) {
      const [cy, cx] = [y0 + ((to[0] - y0) * i) / count, x0 + ((to[1] - x0) * i) / count];
      const [top, left] = [Math.floor(cy - (size - 1) / 2), Math.floor(cx - (size - 1) / 2)];
      for (let y = top; y < top + size; y++) {
        for (let x = left; x < left + size; x++) {
          if (y >= 0 && x >= 0 && y < this.height && x < this.width) this.marked[y * this.width + x] = this.erasing ? 0 : 1;
        }
      }
    }
    this.last = to;
    this.paint();
    this.changed();
  }

  erase(on) {
    this.erasing = on;
    $("erase").setAttribute("aria-pressed", on);
  }

  fill(value) {
    this.marked.fill(value);
    this.erase(false);
    this.paint();
    this.changed();
  }

  // The mask as hexadecimal digits, eight cells to two digits, or null if nothing is marked.
  get mask() {
    if (!this.marked.includes(1)) return null;
    let bits = "";
    for (let i = 0; i < this.marked.length; i += 8) {
      let byte = 0;
      for (let j = 0; j < 8; j++) byte = 2 * byte + (this.marked[i + j] ? 1 : 0);
      bits += byte.toString(16).padStart(2, "0");
    }
    return { height: this.height, width: this.width, bits };
  }

  set mask(mask) {
    if (!mask || mask.height !== this.height || mask.width !== this.width) return;
    for (let i = 0; i < this.marked.length; i++) this.marked[i] = (parseInt(mask.bits.substr(2 * (i >> 3), 2), 16) >> (7 - (i & 7))) & 1;
    this.paint();
  }

  // -- handles

  extend(pad) {
    this.pad = pad.map((cells, i) => Math.min(Math.max(Math.round(cells), 0), this.world[i < 2 ? 0 : 1]));
    this.paint();
    this.changed();
  }

  drag(handle) {
    const side = SIDES.indexOf(handle.dataset.side);
    const [axis, sign] = [side < 2 ? "clientY" : "clientX", side % 2 ? 1 : -1];
    let start = null;
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      start = [event[axis], this.pad[side]];
    });
    handle.addEventListener("pointermove", (event) => {
      if (start) this.extend(this.pad.with(side, start[1] + (sign * (event[axis] - start[0])) / this.cell));
    });
    for (const name of ["pointerup", "pointercancel"]) handle.addEventListener(name, () => (start = null));
    handle.addEventListener("keydown", (event) => {
      const arrows = side < 2 ? { ArrowUp: -1, ArrowDown: 1 } : { ArrowLeft: -1, ArrowRight: 1 };
      if (!(event.key in arrows)) return;
      event.preventDefault();
      this.extend(this.pad.with(side, this.pad[side] + sign * arrows[event.key]));
    });
  }
}
