/**
 * Preview Cloud: a 3D view of the points inside the node. Plain WebGL2, drawn only when something
 * changed.
 *
 * World: x right, y down, z forward, metres; the performer's centre is the origin and the source
 * camera stands before it, towards -z. Cameras have the same axes (OpenCV); matrices are stored
 * column by column, as WebGL takes them. The file is described in models/cloud_file.py.
 */

import {
  BACKDROP_FRAGMENT,
  GROUNDS,
  GROUND_FRAGMENT,
  GROUND_VERTEX,
  SCREEN_VERTEX,
  drawsInSoftware,
  makeProgram,
} from "./graphics.js";
import { listenGestures, wheelZoom } from "./gestures.js";
import { openStoredFile, sentenceOf } from "./stored_file.js";
import { Timeline } from "./timeline.js";
import {
  STEEPEST,
  add,
  axesOf,
  clamp,
  directionOf,
  length,
  niceStep,
  projectionMatrix,
  unit,
  viewMatrix,
} from "./vectors.js";
import { densityOf, icon, makeRoot, options, registerView } from "./view_widget.js";

const MODES = [
  ["color", "Colour", ""],
  ["normals", "Normals", "red right, green up, blue towards you; black = not seen from the front"],
  ["seen", "Seen / guessed", "<b class=head-on></b>seen head-on <b class=grazing></b>grazing <b class=guessed></b>guessed"],
  ["depth", "Depth", "<b class=near></b>near the camera <b class=far></b>far"],
];
const REST = 160; // milliseconds without a change until the picture is drawn finely
const MARGIN = 1.12; // free space around the performer
const ZOOMS = [0.08, 6]; // share of the first distance

// ---- the file ----

/** Fetch a cloud; every frame is handed over as soon as it has come. */
async function loadCloud(file, signal, onHeader, onFrame) {
  const { header, take } = await openStoredFile(file, "TURNCLD1", "cloud", signal);
  onHeader(header);
  for (const [f, count] of header.counts.entries()) {
    onFrame(f, await take(Math.ceil((13 * count) / 4) * 4), count);
  }
}

// ---- shaders ----

const POINTS_VERTEX = `#version 300 es
precision highp float;
layout(location = 0) in vec3 place;   // 0..1 within the box
layout(location = 1) in vec4 paint;   // red green blue confidence
layout(location = 2) in vec2 octant;  // octahedral normal
layout(location = 3) in float girth;  // share of the largest radius
uniform mat4 view, projection;
uniform vec3 low, size, source, sourceForward;
uniform vec2 depths;      // nearest and farthest, from the source camera
uniform float radius;     // metres, the largest
uniform float focal;      // pixels
uniform float ground;     // y of the ground
uniform int mode;         // index into MODES; -1 = shadow on the ground
uniform vec3 shade;
out vec3 color;
flat out vec3 tilt;       // normal of the disc that is drawn, camera axes; 0 0 1 = facing the eye

vec3 unfold(vec2 q) {
  vec3 n = vec3(q, 1.0 - abs(q.x) - abs(q.y));
  if (n.z < 0.0) n.xy = (1.0 - abs(n.yx)) * vec2(n.x < 0.0 ? -1.0 : 1.0, n.y < 0.0 ? -1.0 : 1.0);
  return normalize(n);
}

vec3 depthColor(float t) {  // near = warm and bright, far = cool and dark
  vec3 a = vec3(0.99, 0.91, 0.55), b = vec3(0.94, 0.44, 0.36);
  vec3 c = vec3(0.55, 0.21, 0.53), d = vec3(0.16, 0.13, 0.36);
  return t < 0.33 ? mix(a, b, t / 0.33) : t < 0.67 ? mix(b, c, (t - 0.33) / 0.34) : mix(c, d, (t - 0.67) / 0.33);
}

vec3 paintOf(vec3 world, vec3 normal, vec3 toEye) {
  float confidence = paint.a;
  float facing = dot(normal, toEye);
  if (mode == 1) {
    vec3 n = mat3(view) * normal;
    return confidence > 0.0 && facing > 0.0 ? 0.5 + 0.5 * n * vec3(1.0, -1.0, -1.0) : vec3(0.02);
  }
  if (mode == 2) {
    vec3 seen = mix(vec3(0.80, 0.90, 0.97), vec3(0.09, 0.46, 0.82), confidence);
    return confidence > 0.0 ? seen : vec3(0.95, 0.55, 0.20);
  }
  if (mode == 3) {
    float z = dot(world - source, sourceForward);
    return depthColor(clamp((z - depths.x) / max(depths.y - depths.x, 1e-6), 0.0, 1.0));
  }
  return paint.rgb * (0.8 + 0.2 * abs(facing));  // a little light from the eye
}

void main() {
  vec3 world = low + place * size;
  if (mode == -1) world.y = ground;
  vec4 seen = view * vec4(world, 1.0);
  vec3 eye = -(transpose(mat3(view)) * view[3].xyz);
  gl_Position = projection * seen;
  // Round splats of pixels that lie in a square: the corners between four must be reached.
  gl_PointSize = clamp(2.0 * 1.45 * girth * radius * focal / max(seen.z, 1e-3), 1.5, 96.0);
  vec3 normal = unfold(octant * 2.0 - 1.0);
  color = mode == -1 ? shade : paintOf(world, normal, normalize(eye - world));
  // Seen points lie flat on the surface; a guessed one's normal is borrowed, so it stays a ball.
  vec3 n = mat3(view) * normal;
  tilt = paint.a > 0.0 && mode != -1 && gl_PointSize > 3.0 ? vec3(n.xy, n.z < 0.0 ? min(n.z, -0.3) : max(n.z, 0.3)) : vec3(0, 0, 1);
}`;

const POINTS_FRAGMENT = `#version 300 es
precision mediump float;
in vec3 color;
flat in vec3 tilt;
out vec4 pixel;
void main() {
  vec2 d = gl_PointCoord * 2.0 - 1.0; // y down, as in the camera's axes
  float ahead = dot(tilt.xy, d) / tilt.z;
  if (dot(d, d) + ahead * ahead > 1.0) discard;
  pixel = vec4(color, 1.0);
}`;

// Points are drawn into a picture of their own; here it is shrunk, and creases darkened by how much
// nearer the surroundings of a pixel are (eye-dome lighting), which makes folds and limbs readable.
const COMPOSE_FRAGMENT = `#version 300 es
precision highp float;
uniform sampler2D picture;
uniform highp sampler2D depths;
uniform float fineness;   // samples a pixel, along one side; below 1 they are shared
uniform vec2 range;       // near, far
out vec4 pixel;

float distanceOf(float d) {
  float ndc = 2.0 * d - 1.0;
  return 2.0 * range.x * range.y / (range.y + range.x - ndc * (range.y - range.x));
}

float crease(ivec2 at, float z) {
  float sum = 0.0;
  ivec2 last = textureSize(depths, 0) - 1;
  for (int i = 0; i < 4; i++) {
    ivec2 step = (i < 2 ? ivec2(2 * i - 1, 0) : ivec2(0, 2 * i - 5)) * max(int(fineness), 1);
    float d = texelFetch(depths, clamp(at + step, ivec2(0), last), 0).r;
    if (d < 1.0) sum += clamp(log2(z / distanceOf(d)), 0.0, 0.02);
  }
  return exp(-11.0 * sum);
}

void main() {
  int side = max(int(fineness), 1);
  ivec2 home = fineness < 1.0 ? ivec2(gl_FragCoord.xy * fineness) : ivec2(gl_FragCoord.xy) * side;
  vec3 sum = vec3(0.0);
  float hits = 0.0, nearest = 1.0;
  for (int y = 0; y < side; y++) for (int x = 0; x < side; x++) {
    ivec2 at = home + ivec2(x, y);
    float d = texelFetch(depths, at, 0).r;
    if (d >= 1.0) continue;
    sum += texelFetch(picture, at, 0).rgb * crease(at, distanceOf(d));
    hits += 1.0;
    nearest = min(nearest, d);
  }
  if (hits == 0.0) discard;
  float share = 1.0 / float(side * side);
  pixel = vec4(sum * share, hits * share);
  gl_FragDepth = nearest;
}`;

const LINES_VERTEX = `#version 300 es
precision highp float;
layout(location = 0) in vec3 place;
uniform mat4 view, projection;
void main() { gl_Position = projection * view * vec4(place, 1.0); }`;

const LINES_FRAGMENT = `#version 300 es
precision mediump float;
uniform vec4 line;
out vec4 pixel;
void main() { pixel = vec4(line.rgb * line.a, line.a); }`;

// ---- drawing ----

/** Everything that lives on the graphics card. */
class Scene {
  constructor(canvas) {
    this.gl = canvas.getContext("webgl2", { alpha: false, antialias: false });
    if (!this.gl) {
      throw new Error("This browser has no WebGL2, which the 3D view needs: connect 'turntable' to Preview Image instead.");
    }
    const gl = this.gl;
    this.isSoftware = drawsInSoftware(gl);
    this.points = makeProgram(gl, POINTS_VERTEX, POINTS_FRAGMENT);
    this.backdrop = makeProgram(gl, SCREEN_VERTEX, BACKDROP_FRAGMENT);
    this.compose = makeProgram(gl, SCREEN_VERTEX, COMPOSE_FRAGMENT);
    this.ground = makeProgram(gl, GROUND_VERTEX, GROUND_FRAGMENT);
    this.lines = makeProgram(gl, LINES_VERTEX, LINES_FRAGMENT);
    this.nothing = gl.createVertexArray();
    this.picture = gl.createTexture();
    this.depths = gl.createTexture();
    this.target = gl.createFramebuffer();
    this.targetSize = [0, 0];
    this.frames = [];
    this.cameraLines = this.#vertexArray();
  }

  #vertexArray() {
    const { gl } = this;
    const array = gl.createVertexArray();
    const buffer = gl.createBuffer();
    gl.bindVertexArray(array);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    return { array, buffer, count: 0 };
  }

  setFrame(f, bytes, count) {
    const { gl } = this;
    const frame = this.#vertexArray();
    gl.bufferData(gl.ARRAY_BUFFER, bytes, gl.STATIC_DRAW);
    const columns = [[3, gl.UNSIGNED_SHORT, 6, 0], [4, gl.UNSIGNED_BYTE, 4, 6 * count],
                     [2, gl.UNSIGNED_BYTE, 2, 10 * count], [1, gl.UNSIGNED_BYTE, 1, 12 * count]];
    columns.forEach(([size, type, stride, offset], i) => {
      gl.enableVertexAttribArray(i);
      gl.vertexAttribPointer(i, size, type, true, stride, offset);
    });
    gl.bindVertexArray(null);
    this.frames[f] = { ...frame, count };
  }

  /** The source camera as a pyramid; `corners` are five points, its tip first. */
  setCamera(corners) {
    const { gl } = this;
    const order = [0, 1, 0, 2, 0, 3, 0, 4, 1, 2, 2, 3, 3, 4, 4, 1];
    gl.bindVertexArray(this.cameraLines.array);
    gl.bindBuffer(gl.ARRAY_BUFFER, this.cameraLines.buffer);
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(order.flatMap((i) => corners[i])), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
    gl.bindVertexArray(null);
    this.cameraLines.count = order.length;
  }

  #sizeTarget(width, height) {
    const { gl } = this;
    if (this.targetSize[0] === width && this.targetSize[1] === height) return;
    this.targetSize = [width, height];
    const parts = [[this.picture, gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE, gl.COLOR_ATTACHMENT0],
                   [this.depths, gl.DEPTH_COMPONENT24, gl.DEPTH_COMPONENT, gl.UNSIGNED_INT, gl.DEPTH_ATTACHMENT]];
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.target);
    for (const [texture, inner, format, type, place] of parts) {
      gl.bindTexture(gl.TEXTURE_2D, texture);
      gl.texImage2D(gl.TEXTURE_2D, 0, inner, width, height, 0, format, type, null);
      gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
      gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
      gl.framebufferTexture2D(gl.FRAMEBUFFER, place, gl.TEXTURE_2D, texture, 0);
    }
  }

  /** One picture; `values` are the uniforms of all shaders by name. */
  draw(f, values, fineness, extras) {
    const { gl } = this;
    const [width, height] = [gl.drawingBufferWidth, gl.drawingBufferHeight];
    const frame = this.frames[f];
    const focal = (pixels) => pixels / 2 / values.tan;
    gl.disable(gl.BLEND);
    gl.enable(gl.DEPTH_TEST);
    gl.depthFunc(gl.LEQUAL);
    gl.depthMask(true);
    const fine = [width, height].map((v) => Math.ceil(v * fineness));
    this.#sizeTarget(...fine);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.target);
    gl.viewport(0, 0, ...fine);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    this.#drawPoints(frame, { ...values, focal: focal(fine[1]) });

    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.viewport(0, 0, width, height);
    gl.clear(gl.DEPTH_BUFFER_BIT);
    gl.bindVertexArray(this.nothing);
    gl.depthMask(false);
    gl.disable(gl.DEPTH_TEST);
    this.backdrop(values);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.ground(values);
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
    if (extras.shadow) {
      gl.blendEquation(gl.MIN); // many splats on one spot darken it once
      this.#drawPoints(frame, { ...values, mode: -1, focal: focal(height) });
      gl.blendEquation(gl.FUNC_ADD);
    }
    gl.enable(gl.DEPTH_TEST);
    gl.depthMask(true);
    if (extras.camera && this.cameraLines.count) {
      this.lines({ ...values, line: [0.35, 0.66, 1, 1] });
      gl.bindVertexArray(this.cameraLines.array);
      gl.drawArrays(gl.LINES, 0, this.cameraLines.count);
    }
    gl.activeTexture(gl.TEXTURE1);
    gl.bindTexture(gl.TEXTURE_2D, this.depths);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, this.picture);
    gl.bindVertexArray(this.nothing);
    this.compose({ ...values, fineness, picture: 0, depths: 1 });
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.bindTexture(gl.TEXTURE_2D, null);
  }

  #drawPoints(frame, values) {
    if (!frame?.count) return;
    this.points(values);
    this.gl.bindVertexArray(frame.array);
    this.gl.drawArrays(this.gl.POINTS, 0, frame.count);
  }

  dispose() {
    // Giving the context back frees all that hangs on it; browsers hold only 16.
    this.gl.getExtension("WEBGL_lose_context")?.loseContext();
  }
}

// ---- where the eye stands ----

/** What never changes while a cloud is shown: its box, its source camera, the first look at it. */
function stageOf(header) {
  const { inner_low: low, inner_high: high, source } = header;
  const middle = low.map((v, i) => (v + high[i]) / 2);
  const half = low.map((v, i) => Math.max((high[i] - v) / 2, 1e-4));
  const girth = Math.max(half[0], half[2]); // turned to the side, the performer is as wide
  const away = add(source.center, middle, -1);
  const size = Math.hypot(girth, half[1]);
  // A source camera inside the body is no place to look from.
  const distance = Math.max(length(away), 1.5 * size);
  const [x, y, z] = length(away) > 1e-6 ? unit(away) : [0, 0, -1];
  const ahead = Math.max(distance - girth, 0.2 * distance);
  const depths = [middle[2] - half[2], middle[2] + half[2]].map((v) => v - source.center[2]);
  return {
    middle,
    size,
    distance,
    azimuth: Math.atan2(x, -z),
    elevation: clamp(Math.asin(clamp(-y, -1, 1)), -STEEPEST, STEEPEST),
    tanHigh: (MARGIN * half[1]) / ahead,
    tanWide: (MARGIN * girth) / ahead,
    ground: high[1],
    cell: niceStep(size / 2),
    depths,
    corners: cameraCorners(source, 0.16 * length(away)),
  };
}

/** The source camera's tip and the corners of its picture at a depth, world. */
function cameraCorners({ center, rotation, K, width, height }, depth) {
  const corner = ([u, v]) => {
    const ray = [(u - K[0][2]) / K[0][0], (v - K[1][2]) / K[1][1], 1].map((r) => r * depth);
    return add(center, [0, 1, 2].map((i) => rotation[0][i] * ray[0] + rotation[1][i] * ray[1] + rotation[2][i] * ray[2]));
  };
  return [center, ...[[0, 0], [width, 0], [width, height], [0, height]].map(corner)];
}

/** The uniforms that follow from where the eye stands; `look` is relative to the first look. */
function lookFrom(stage, look, aspect) {
  const tan = clamp(Math.max(stage.tanHigh, stage.tanWide / aspect), 0.02, 1.2);
  const distance = stage.distance * look.zoom;
  const azimuth = stage.azimuth + look.azimuth;
  const elevation = clamp(stage.elevation + look.elevation, -STEEPEST, STEEPEST);
  const target = add(stage.middle, look.shift, stage.distance);
  const eye = add(target, directionOf(azimuth, elevation), distance);
  const axes = axesOf(eye, target);
  const range = [0.02 * distance, distance + 2 * stage.distance + 8 * stage.size];
  return {
    eye,
    axes,
    tan,
    range,
    view: viewMatrix(eye, axes),
    projection: projectionMatrix(tan, aspect, ...range),
  };
}

const firstLook = () => ({ azimuth: 0, elevation: 0, zoom: 1, shift: [0, 0, 0] });

// ---- the widget ----

const STYLE = `
.turnaround-cloud .legend b { display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin: 0 4px 0 8px; }
.turnaround-cloud .legend b:first-child { margin-left: 0; }
.turnaround-cloud .head-on { background: #1775d1; } .turnaround-cloud .grazing { background: #cce6f7; }
.turnaround-cloud .guessed { background: #f28c33; } .turnaround-cloud .near { background: #fce88c; }
.turnaround-cloud .far { background: #3d2a6b; }`;

const MARKUP = `
<div class="stage">
  <div class="legend" hidden></div>
  <div class="hint" hidden>drag = turn · wheel = zoom · right-drag = move · double-click = back</div>
  <div class="words"></div>
</div>
<div class="bar">
  <button class="play" title="Play or pause (space)"></button>
  <input type="range" min="0" max="0" value="0" step="1" title="Frame (arrow keys)">
  <output></output>
  <select title="What the colours mean">${options(MODES)}</select>
  <button class="ground" title="Dark or light background">${icon("ground")}</button>
  <button class="home" title="Back to the source camera's view (double-click)">${icon("home")}</button>
</div>`;

const EMPTY = "Run the graph to see the cloud here.";

/** The view inside one node. */
class CloudView {
  /** `memory` keeps the choices of a creator with the node: mode and ground. */
  constructor(memory) {
    this.memory = memory;
    this.look = firstLook();
    this.timeline = new Timeline();
    this.isVisible = true;
    this.root = makeRoot("turnaround-cloud", MARKUP);
    const part = (selector) => this.root.querySelector(selector);
    this.parts = {
      stage: part(".stage"), legend: part(".legend"), hint: part(".hint"), words: part(".words"), play: part(".play"),
      slider: part("input"), count: part("output"), mode: part("select"),
    };
    this.#listen(part(".ground"), part(".home"));
    this.#say(EMPTY);
    this.#showControls();
  }

  // -- loading --

  /** Show the cloud of a node's output; the same one is not loaded twice. */
  show(file) {
    const isShown = this.file?.filename === file.filename && this.file?.checksum === file.checksum;
    if (isShown && this.scene) return;
    this.#load(file);
  }

  async #load(file) {
    this.#release();
    this.file = file;
    const loading = (this.loading = new AbortController());
    this.#say("Loading the cloud …");
    try {
      this.#makeScene();
      await loadCloud(
        file,
        loading.signal,
        (header) => this.#begin(header),
        (f, bytes, count) => this.#receive(f, bytes, count),
      );
      this.root.dataset.state = "ready";
      this.#showControls();
    } catch (error) {
      if (loading.signal.aborted) return;
      this.#release();
      this.#say(sentenceOf(error), "failed");
    }
  }

  #makeScene() {
    const canvas = (this.canvas = document.createElement("canvas"));
    canvas.tabIndex = 0;
    canvas.setAttribute("aria-label", "3D view of the cloud");
    canvas.addEventListener("webglcontextlost", (event) => {
      event.preventDefault();
      // Browsers keep 16 such views alive and drop the oldest.
      if (this.canvas === canvas) this.#pauseForMemory();
    });
    this.#listenCanvas(canvas);
    this.scene = new Scene(canvas);
    this.parts.stage.prepend(canvas);
    this.watch = new ResizeObserver(() => this.redraw());
    this.watch.observe(this.parts.stage);
    this.sight = new IntersectionObserver((entries) => {
      this.isVisible = entries.at(-1).isIntersecting; // on a busy page several come together
      if (this.isVisible) this.redraw();
    });
    this.sight.observe(this.parts.stage);
  }

  #begin(header) {
    this.header = header;
    this.stage = stageOf(header);
    this.scene.setCamera(this.stage.corners);
    this.timeline.total = header.counts.length;
    this.timeline.fps = header.fps || 1;
    this.timeline.hold(this.timeline.time);
    this.parts.slider.max = header.counts.length - 1;
    this.parts.hint.hidden = Boolean(this.memory.knowsHow);
    this.#showControls();
  }

  #receive(f, bytes, count) {
    this.scene.setFrame(f, bytes, count);
    if (f > 0 && f !== this.frame) {
      if (f % 8 === 0) this.#showControls();
      return;
    }
    this.#say("");
    this.redraw();
  }

  #pauseForMemory() {
    const { file } = this;
    this.#release();
    this.#say("The browser put this view to sleep to spare memory: click here to wake it.", "asleep");
    this.parts.stage.addEventListener("pointerdown", () => this.file === file && !this.scene && this.#load(file), {
      once: true,
    });
  }

  /** Let go of everything but the file's name; `show` begins anew. */
  #release() {
    this.loading?.abort();
    this.watch?.disconnect();
    this.sight?.disconnect();
    cancelAnimationFrame(this.ticket);
    clearTimeout(this.rest);
    this.ticket = null;
    const { scene, canvas } = this;
    this.scene = this.canvas = this.header = this.stage = null;
    scene?.dispose();
    canvas?.remove();
  }

  dispose() {
    this.timeline.play(false);
    this.#release();
    this.#say(EMPTY);
    this.#showControls();
  }

  // -- controls --

  get mode() {
    return Math.max(0, MODES.findIndex(([key]) => key === this.memory.colors));
  }

  get ground() {
    return GROUNDS[this.memory.ground] ? this.memory.ground : "dark";
  }

  #say(text, state = text === EMPTY ? "empty" : "loading") {
    this.parts.words.textContent = text;
    this.root.dataset.state = state;
    if (!this.scene) this.parts.legend.hidden = this.parts.hint.hidden = true;
  }

  #showControls() {
    const { play, slider, count, mode, legend } = this.parts;
    const total = this.header?.counts.length ?? 0;
    const come = this.scene?.frames.length ?? 0;
    play.innerHTML = icon(this.timeline.isPlaying ? "pause" : "play");
    play.disabled = slider.disabled = total < 2;
    slider.value = this.frame;
    const text = total ? `${this.frame + 1} / ${total}` : "";
    count.textContent = come < total ? `${Math.round((100 * come) / total)} %` : text;
    mode.value = MODES[this.mode][0];
    legend.innerHTML = MODES[this.mode][2];
    legend.hidden = !total || !MODES[this.mode][2];
  }

  get frame() {
    return this.timeline.frame;
  }

  setFrame(f) {
    this.timeline.seek(Math.round(f));
    this.root.dataset.frame = this.frame;
    this.redraw();
  }

  setPlaying(isPlaying) {
    this.timeline.play(isPlaying);
    this.redraw();
  }

  #remember(key, value) {
    this.memory[key] = value;
    this.redraw();
  }

  #listen(ground, home) {
    const { root, parts } = this;
    root.addEventListener("keydown", (event) => this.#onKey(event));
    parts.play.addEventListener("click", () => this.setPlaying(!this.timeline.isPlaying));
    parts.slider.addEventListener("input", () => {
      this.timeline.play(false);
      this.setFrame(parts.slider.valueAsNumber);
    });
    parts.mode.addEventListener("change", () => this.#remember("colors", parts.mode.value));
    ground.addEventListener("click", () => this.#remember("ground", this.ground === "dark" ? "light" : "dark"));
    home.addEventListener("click", () => this.#goHome());
  }

  #goHome() {
    this.look = firstLook();
    this.redraw();
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === this.parts.mode) return;
    const deeds = {
      " ": () => this.setPlaying(!this.timeline.isPlaying),
      ArrowLeft: () => this.setFrame(this.frame - 1),
      ArrowRight: () => this.setFrame(this.frame + 1),
      Home: () => this.setFrame(0),
      End: () => this.setFrame(-1),
    };
    const deed = deeds[event.key];
    // A focused button answers the space bar by itself.
    if (!deed || (event.key === " " && event.target.tagName === "BUTTON")) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key !== " ") this.timeline.play(false);
    deed();
  }

  #listenCanvas(canvas) {
    listenGestures(canvas, {
      turn: (dx, dy) => this.#turn(dx, dy),
      move: (dx, dy) => this.#move(dx, dy),
      zoom: (factor) => this.#zoom(factor),
      home: () => this.#goHome(),
    });
  }

  zoom(event) {
    this.#zoom(wheelZoom(event));
  }

  #zoom(factor) {
    this.look.zoom = clamp(this.look.zoom * factor, ...ZOOMS);
    this.#learned();
  }

  #learned() {
    this.memory.knowsHow = true;
    this.parts.hint.hidden = true;
    this.redraw();
  }

  /** Turn by shares of the view's height. */
  #turn(dx, dy) {
    if (!this.stage) return;
    const first = this.stage.elevation;
    this.look.azimuth -= 3.5 * dx;
    this.look.elevation = clamp(first + this.look.elevation + 3.5 * dy, -STEEPEST, STEEPEST) - first;
    this.#learned();
  }

  #move(dx, dy) {
    if (!this.stage) return;
    const { axes, tan } = lookFrom(this.stage, this.look, this.#aspect());
    const scale = 2 * tan * this.look.zoom;
    this.look.shift = add(add(this.look.shift, axes[0], -dx * scale), axes[1], -dy * scale);
    this.#learned();
  }

  // -- drawing --

  #aspect() {
    const { clientWidth, clientHeight } = this.parts.stage;
    return clientWidth / clientHeight || 1;
  }

  /** Draw once, soon; while playing, go on. */
  redraw() {
    this.#showControls();
    clearTimeout(this.rest);
    if (this.ticket == null && this.scene) this.ticket = requestAnimationFrame((now) => this.#tick(now));
  }

  #tick(now) {
    this.ticket = null;
    if (!this.scene?.frames.length || !this.isVisible || !this.parts.stage.clientWidth) return;
    if (this.timeline.isPlaying) this.#advance(now);
    this.#draw(false);
    if (this.timeline.isPlaying) this.ticket = requestAnimationFrame((later) => this.#tick(later));
    else this.rest = setTimeout(() => this.#draw(true), REST);
  }

  #advance(now) {
    const before = this.frame;
    this.timeline.advance(now);
    if (this.frame === before) return;
    this.root.dataset.frame = this.frame;
    this.#showControls();
  }

  /** `isStill`: nothing moves, so the picture may cost more. */
  #draw(isStill) {
    const { scene, stage, header, canvas } = this;
    if (!scene || !stage || canvas.clientWidth === 0) return;
    const density = densityOf(canvas);
    const size = [canvas.clientWidth, canvas.clientHeight].map((v) => clamp(Math.round(v * density), 1, 4096));
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    // Without a graphics card a moving picture is drawn coarsely.
    const fineness = scene.isSoftware && !isStill ? 0.5 : density < 2 ? 2 : 1;
    const look = lookFrom(stage, this.look, size[0] / size[1]);
    const source = header.source;
    const values = {
      ...look, ...GROUNDS[this.ground], low: header.low, size: header.size, radius: header.radius,
      source: source.center, sourceForward: source.rotation[2], depths: stage.depths, mode: this.mode,
      ground: stage.ground, cell: stage.cell, reach: 3.2 * stage.size,
      middle: [stage.middle[0], stage.ground, stage.middle[2]],
    };
    scene.draw(this.#nearestLoaded(), values, fineness, {
      shadow: look.eye[1] < stage.ground,
      camera: length(add(look.eye, source.center, -1)) > 0.35 * stage.distance,
    });
  }

  /** The frame to draw: while loading, the last that has come before the wanted one. */
  #nearestLoaded() {
    return Math.min(this.frame, this.scene.frames.length - 1);
  }
}

registerView({
  extension: "Turnaround.PreviewCloud",
  nodeClass: "TurnaroundPreviewCloud",
  widget: "cloud_view",
  output: "turnaround_cloud",
  minHeight: 280,
  firstSize: [420, 640],
  style: STYLE,
  make: (memory) => new CloudView(memory),
});
