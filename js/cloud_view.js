/**
 * Preview Cloud: a 3D view of the points inside the node. Plain WebGL2, drawn only when something
 * changed.
 *
 * World: x right, y down, z forward, metres; the performer's centre is the origin and the source
 * camera stands before it, towards -z. Cameras have the same axes (OpenCV); matrices are stored
 * column by column, as WebGL takes them. The file is described in models/cloud_file.py.
 */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NODE = "TurnaroundPreviewCloud";
const OUTPUT = "turnaround_cloud";
const MIN_HEIGHT = 280; // pixels of the whole widget
const FIRST_SIZE = [420, 640]; // of a new node
const MODES = [
  ["color", "Colour", ""],
  ["normals", "Normals", "red right, green up, blue towards you; black = not seen from the front"],
  ["seen", "Seen / guessed", "<b class=head-on></b>seen head-on <b class=grazing></b>grazing <b class=guessed></b>guessed"],
  ["depth", "Depth", "<b class=near></b>near the camera <b class=far></b>far"],
];
const GROUNDS = {
  dark: { inner: [0.17, 0.18, 0.2], outer: [0.085, 0.09, 0.105], line: [1, 1, 1, 0.16], shade: [0.06, 0.063, 0.07] },
  light: { inner: [0.97, 0.972, 0.975], outer: [0.8, 0.81, 0.83], line: [0, 0, 0, 0.18], shade: [0.66, 0.67, 0.69] },
};
const REST = 160; // milliseconds without a change until the picture is drawn finely
const MARGIN = 1.12; // free space around the performer
const STEEPEST = 1.5; // radians above or below the horizon
const ZOOMS = [0.08, 6]; // share of the first distance

// ---- vectors and matrices ----

const add = (a, b, k = 1) => a.map((v, i) => v + k * b[i]);
const length = (a) => Math.hypot(...a);
const unit = (a) => a.map((v) => v / (length(a) || 1));
const cross = (a, b) => [
  a[1] * b[2] - a[2] * b[1],
  a[2] * b[0] - a[0] * b[2],
  a[0] * b[1] - a[1] * b[0],
];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));

/** Rows right, down, forward of a camera at `eye` that looks at `target`. */
function axesOf(eye, target) {
  const forward = unit(add(target, eye, -1));
  const right = unit(cross([0, 1, 0], forward));
  return [right, cross(forward, right), forward];
}

function viewMatrix(eye, axes) {
  const columns = [0, 1, 2].map((i) => [axes[0][i], axes[1][i], axes[2][i], 0]);
  return new Float32Array([...columns.flat(), ...axes.map((a) => -dot(a, eye)), 1]);
}

/** Camera space (y down, z forward) to WebGL's clip space. */
function projectionMatrix(tan, aspect, near, far) {
  const depth = far - near;
  return new Float32Array([
    1 / (tan * aspect), 0, 0, 0,
    0, -1 / tan, 0, 0,
    0, 0, (far + near) / depth, 1,
    0, 0, (-2 * far * near) / depth, 0,
  ]);
}

// ---- the file ----

/** A function that gives the next `count` bytes of a stream. */
function byteReader(stream) {
  const reader = stream.getReader();
  let rest = new Uint8Array(0);
  return async function take(count) {
    const whole = new Uint8Array(count);
    for (let filled = 0; filled < count; ) {
      if (!rest.length) {
        const { done, value } = await reader.read();
        if (done) throw new Error("The cloud's file is cut off: run the node again.");
        rest = value;
      }
      const part = rest.subarray(0, count - filled);
      whole.set(part, filled);
      filled += part.length;
      rest = rest.subarray(part.length);
    }
    return whole;
  };
}

/** Fetch a cloud; every frame is handed over as soon as it has come. */
async function loadCloud(file, signal, onHeader, onFrame) {
  const query = new URLSearchParams({
    filename: file.filename,
    subfolder: file.subfolder,
    type: file.type,
    checksum: file.checksum, // another cloud of this name is not taken from the browser's cache
  });
  const answer = await fetch(api.apiURL(`/view?${query}`), { signal });
  if (answer.status === 404) {
    throw new Error("The cloud's file is gone, as ComfyUI clears its temp folder: run the node again.");
  }
  if (!answer.ok) throw new Error(`ComfyUI did not hand out the cloud (${answer.status}): run the node again.`);
  const take = byteReader(answer.body);
  if (new TextDecoder().decode(await take(8)) !== "TURNCLD1") {
    throw new Error("The cloud was written by another version of Turnaround: run the node again.");
  }
  const size = new DataView((await take(4)).buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(await take(size)));
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

const SCREEN_VERTEX = `#version 300 es
out vec2 uv;
void main() {
  uv = vec2(gl_VertexID == 1 ? 2.0 : 0.0, gl_VertexID == 2 ? 2.0 : 0.0);
  gl_Position = vec4(uv * 2.0 - 1.0, 0.0, 1.0);
}`;

const BACKDROP_FRAGMENT = `#version 300 es
precision highp float;
in vec2 uv;
uniform vec3 inner, outer;
out vec4 pixel;
void main() {
  vec2 d = uv - vec2(0.5, 0.35);
  pixel = vec4(mix(inner, outer, smoothstep(0.0, 0.75, length(d))), 1.0);
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

const GROUND_VERTEX = `#version 300 es
precision highp float;
uniform mat4 view, projection;
uniform vec3 middle;      // under the performer
uniform float reach;      // metres
out vec2 place;
void main() {
  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0;
  place = corner * reach;
  gl_Position = projection * view * vec4(middle.x + place.x, middle.y, middle.z + place.y, 1.0);
}`;

const GROUND_FRAGMENT = `#version 300 es
precision highp float;
in vec2 place;
uniform float reach, cell; // metres
uniform vec4 line;
out vec4 pixel;
void main() {
  vec2 p = place / cell;
  vec2 width = fwidth(p);
  vec2 near = abs(fract(p - 0.5) - 0.5) / width;
  float ink = 1.0 - min(min(near.x, near.y), 1.0);
  float fade = smoothstep(1.0, 0.15, length(place) / reach) / (1.0 + 2.0 * max(width.x, width.y));
  pixel = vec4(line.rgb, 1.0) * (line.a * ink * fade);
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

function makeProgram(gl, vertex, fragment) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
    gl.deleteShader(shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) {
    throw new Error("The graphics driver refused to draw the cloud: update it, or use the turntable output.");
  }
  const places = new Map();
  const count = gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS) ?? 0;
  for (let i = 0; i < count; i++) {
    const { name, type } = gl.getActiveUniform(program, i);
    places.set(name, [gl.getUniformLocation(program, name), type]);
  }
  const setters = {
    [gl.FLOAT]: "uniform1f", [gl.INT]: "uniform1i", [gl.SAMPLER_2D]: "uniform1i",
    [gl.FLOAT_VEC2]: "uniform2fv", [gl.FLOAT_VEC3]: "uniform3fv", [gl.FLOAT_VEC4]: "uniform4fv",
  };
  return function use(values) {
    gl.useProgram(program);
    for (const [name, [place, type]] of places) {
      if (type === gl.FLOAT_MAT4) gl.uniformMatrix4fv(place, false, values[name]);
      else gl[setters[type]](place, values[name]);
    }
  };
}

/** Everything that lives on the graphics card. */
class Scene {
  constructor(canvas) {
    this.gl = canvas.getContext("webgl2", { alpha: false, antialias: false });
    if (!this.gl) {
      throw new Error("This browser has no WebGL2, which the 3D view needs: connect 'turntable' to Preview Image instead.");
    }
    const gl = this.gl;
    const info = gl.getExtension("WEBGL_debug_renderer_info");
    const name = String(gl.getParameter(info ? info.UNMASKED_RENDERER_WEBGL : gl.RENDERER));
    this.isSoftware = /swiftshader|llvmpipe|software|basic render/i.test(name);
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

/** 1, 2 or 5 times a power of ten. */
function niceStep(v) {
  const ten = 10 ** Math.floor(Math.log10(v));
  return ten * ([5, 2].find((n) => n * ten <= v) ?? 1);
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
  const level = Math.cos(elevation);
  const direction = [Math.sin(azimuth) * level, -Math.sin(elevation), -Math.cos(azimuth) * level];
  const target = add(stage.middle, look.shift, stage.distance);
  const eye = add(target, direction, distance);
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

const ICONS = {
  play: "M4 2.5v11l9-5.5z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  ground: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM8 3v10A5 5 0 0 1 8 3z",
  home: "M8 2.2 14 8h-1.8v5.5H9.4V9.8H6.6v3.7H3.8V8H2z",
};
const icon = (name) => `<svg viewBox="0 0 16 16" width="14" height="14" fill="currentColor" fill-rule="evenodd"><path d="${ICONS[name]}"/></svg>`;

const STYLE = `
.turnaround-cloud { display: flex; flex-direction: column; width: 100%; height: 100%; min-height: ${MIN_HEIGHT - 20}px;
  box-sizing: border-box; overflow: hidden; border-radius: 6px; font: 12px/1.3 sans-serif;
  border: 1px solid var(--border-color, #4e4e4e); color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); user-select: none; }
.turnaround-cloud .stage { position: relative; flex: 1 1 0; min-height: 0; background: #17181b; }
.turnaround-cloud canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: block;
  cursor: grab; touch-action: none; outline: none; }
.turnaround-cloud canvas:active { cursor: grabbing; }
.turnaround-cloud .stage:focus-within { box-shadow: inset 0 0 0 1px #4a90d9; }
.turnaround-cloud .words { position: absolute; inset: 0; display: grid; place-items: center; padding: 16px;
  text-align: center; color: #b9bcc4; pointer-events: none; }
.turnaround-cloud .legend { position: absolute; left: 8px; top: 6px; right: 8px; color: #fff; opacity: .85;
  text-shadow: 0 0 3px #000, 0 0 3px #000; pointer-events: none; }
.turnaround-cloud .legend b { display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin: 0 4px 0 8px; }
.turnaround-cloud .legend b:first-child { margin-left: 0; }
.turnaround-cloud .head-on { background: #1775d1; } .turnaround-cloud .grazing { background: #cce6f7; }
.turnaround-cloud .guessed { background: #f28c33; } .turnaround-cloud .near { background: #fce88c; }
.turnaround-cloud .far { background: #3d2a6b; }
.turnaround-cloud .hint { position: absolute; left: 0; right: 0; bottom: 6px; text-align: center; opacity: .6;
  color: #fff; text-shadow: 0 0 3px #000; pointer-events: none; font-size: 11px; }
.turnaround-cloud .bar { display: flex; align-items: center; gap: 6px; padding: 5px 6px; flex: none; }
.turnaround-cloud .bar input { flex: 1 1 40px; min-width: 30px; accent-color: #4a90d9; }
.turnaround-cloud .bar button, .turnaround-cloud .bar select { height: 24px; color: inherit; cursor: pointer;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; font: inherit;
  background: var(--comfy-menu-bg, #353535); }
.turnaround-cloud .bar button { width: 28px; padding: 0; display: grid; place-items: center; flex: none; }
.turnaround-cloud .bar output { min-width: 44px; text-align: right; font-variant-numeric: tabular-nums; }
.turnaround-cloud [hidden] { display: none !important; }`;

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
  <select title="What the colours mean">${MODES.map(([key, label]) => `<option value="${key}">${label}</option>`).join("")}</select>
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
    this.frame = 0;
    this.isPlaying = false;
    this.isVisible = true;
    this.root = document.createElement("div");
    // ComfyUI's newer nodes give the room that is left to what expands.
    this.root.className = "turnaround-cloud widget-expands";
    this.root.innerHTML = MARKUP;
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
      const isNetwork = error instanceof TypeError; // as fetch has it
      this.#say(isNetwork ? "ComfyUI did not answer: start it and run the node again." : error.message, "failed");
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
    this.sight = new IntersectionObserver(([entry]) => {
      this.isVisible = entry.isIntersecting;
      if (this.isVisible) this.redraw();
    });
    this.sight.observe(this.parts.stage);
  }

  #begin(header) {
    this.header = header;
    this.stage = stageOf(header);
    this.scene.setCamera(this.stage.corners);
    this.frame = Math.min(this.frame, header.counts.length - 1);
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
    this.isPlaying = false;
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
    play.innerHTML = icon(this.isPlaying ? "pause" : "play");
    play.disabled = slider.disabled = total < 2;
    slider.value = this.frame;
    const text = total ? `${this.frame + 1} / ${total}` : "";
    count.textContent = come < total ? `${Math.round((100 * come) / total)} %` : text;
    mode.value = MODES[this.mode][0];
    legend.innerHTML = MODES[this.mode][2];
    legend.hidden = !total || !MODES[this.mode][2];
  }

  setFrame(f) {
    const total = this.header?.counts.length ?? 1;
    this.frame = ((Math.round(f) % total) + total) % total;
    this.root.dataset.frame = this.frame;
    this.redraw();
  }

  setPlaying(isPlaying) {
    this.isPlaying = isPlaying && (this.header?.counts.length ?? 0) > 1;
    this.began = performance.now() - (1000 * this.frame) / (this.header?.fps || 1);
    this.redraw();
  }

  #remember(key, value) {
    this.memory[key] = value;
    this.redraw();
  }

  #listen(ground, home) {
    const { root, parts } = this;
    // What happens in here is not for the graph below: neither dragging nodes nor zooming the graph.
    for (const kind of ["pointerdown", "pointerup", "dblclick", "contextmenu", "click"]) {
      root.addEventListener(kind, (event) => event.button !== 1 && event.stopPropagation());
    }
    root.addEventListener("keydown", (event) => this.#onKey(event));
    parts.play.addEventListener("click", () => this.setPlaying(!this.isPlaying));
    parts.slider.addEventListener("input", () => {
      this.isPlaying = false;
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
      " ": () => this.setPlaying(!this.isPlaying),
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
    if (event.key !== " ") this.isPlaying = false;
    deed();
  }

  #listenCanvas(canvas) {
    let last = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button === 1) return; // moves the graph, as everywhere
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      last = [event.clientX, event.clientY];
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      event.stopPropagation();
      const now = [event.clientX, event.clientY];
      const [dx, dy] = add(now, last, -1).map((v) => v / canvas.getBoundingClientRect().height);
      last = now;
      if (event.buttons & 2 || event.shiftKey) this.#move(dx, dy);
      else this.#turn(dx, dy);
    });
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(kind, () => (last = null));
    }
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("dblclick", () => this.#goHome());
  }

  zoom(event) {
    const lines = event.deltaMode === 1 ? 16 : 1; // some browsers count in lines
    this.look.zoom = clamp(this.look.zoom * Math.exp(0.0012 * lines * event.deltaY), ...ZOOMS);
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
    if (this.isPlaying) this.#advance(now);
    this.#draw(false);
    if (this.isPlaying) this.ticket = requestAnimationFrame((later) => this.#tick(later));
    else this.rest = setTimeout(() => this.#draw(true), REST);
  }

  #advance(now) {
    const total = this.header.counts.length;
    const f = Math.floor((Math.max(0, now - this.began) * this.header.fps) / 1000) % total;
    if (f === this.frame) return;
    this.frame = f;
    this.root.dataset.frame = f;
    this.#showControls();
  }

  /** `isStill`: nothing moves, so the picture may cost more. */
  #draw(isStill) {
    const { scene, stage, header, canvas } = this;
    if (!scene || !stage || canvas.clientWidth === 0) return;
    // The graph's zoom scales the node: draw as many pixels as are on screen.
    const zoom = clamp(canvas.getBoundingClientRect().width / canvas.clientWidth, 0.5, 2);
    const density = zoom * devicePixelRatio;
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

// ---- ComfyUI ----

const views = new Map(); // node -> its CloudView

/** The output that the page holds for a node; nodes of subgraphs are named by both ids. */
function outputOf(node, outputs) {
  const isInside = node.graph && node.graph.isRootGraph === false;
  return outputs?.[isInside ? `${node.graph.id}:${node.id}` : String(node.id)]?.[OUTPUT]?.[0];
}

function addView(node) {
  node.properties.cloud_view ??= {};
  const view = new CloudView(node.properties.cloud_view);
  const widget = node.addDOMWidget("cloud_view", "turnaround_cloud", view.root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => MIN_HEIGHT,
  });
  widget.serialize = false; // not in the workflow file either
  const { onExecuted, onRemoved, onAdded, onConfigure } = node;
  node.onAdded = function (...given) {
    onAdded?.apply(this, given);
    views.set(node, view);
  };
  node.onConfigure = function (...given) {
    onConfigure?.apply(this, given);
    view.memory = node.properties.cloud_view ??= {}; // a loaded workflow brings its own
    view.redraw();
  };
  node.onExecuted = function (output, ...given) {
    onExecuted?.call(this, output, ...given);
    if (output?.[OUTPUT]?.[0]) view.show(output[OUTPUT][0]);
  };
  node.onRemoved = function (...given) {
    onRemoved?.apply(this, given);
    views.delete(node);
    view.dispose();
  };
  node.setSize([Math.max(node.size[0], FIRST_SIZE[0]), Math.max(node.size[1], FIRST_SIZE[1])]);
}

/** After a change of workflow, undo or a look into the history, no node runs, but outputs are there. */
function showHeldOutput(node, outputs) {
  const file = outputOf(node, outputs);
  if (file) views.get(node)?.show(file);
}

/** The wheel over a view is the view's; caught early, as ComfyUI's newer nodes take it on its way. */
function onWheel(event) {
  const view = [...views.values()].find((v) => v.canvas === event.target);
  if (!view?.canvas) return;
  event.preventDefault();
  event.stopPropagation();
  view.zoom(event);
}

app.registerExtension({
  name: "Turnaround.PreviewCloud",
  init() {
    window.addEventListener("wheel", onWheel, { capture: true, passive: false });
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) addView(node);
  },
  loadedGraphNode(node) {
    if (node.comfyClass === NODE) showHeldOutput(node, app.nodeOutputs);
  },
  onNodeOutputsUpdated(outputs) {
    for (const node of views.keys()) showHeldOutput(node, outputs);
  },
});
