/**
 * Gaussian splats on the graphics card: elliptical weighted averaging as models/rasterize_splats.py
 * has it, laid over each other from the farthest to the nearest.
 *
 * A frame is a texture of one texel a Gaussian (js/splat_stream.js); two frames are blended at any time
 * between them, so nothing is uploaded while one orbits.
 */

import {
  BACKDROP_FRAGMENT,
  GROUND_FRAGMENT,
  GROUND_VERTEX,
  SCREEN_VERTEX,
  drawsInSoftware,
  makeProgram,
} from "./graphics.js";
import { t } from "./words.js";

const ROW = 2048; // texels; every graphics card takes as many
const BESIDE = 0.3; // how far beside the picture a Gaussian's shape follows its place
const UNITS = { low: 0, high: 1, lowGains: 2, highGains: 3, opacities: 4, sheen: 5, order: 6 };
// Gaussians a drawn instance: with one each, graphics cards leave most of their lanes idle, and drawing
// without a card costs 19 microseconds an instance.
const BLOCK = 4096;

const SPLAT_VERTEX = `#version 300 es
precision highp float;
precision highp int;
precision highp usampler2D;
precision highp isampler2D;
uniform usampler2D low, high, lowGains, highGains, opacities;
uniform usampler2D order;   // numbers of the Gaussians, the farthest first
uniform int sorted;         // how many of them
uniform isampler2D sheen;
uniform float share;        // of the later frame
uniform int degree;         // of the harmonics
uniform mat4 view;
uniform vec3 eye;
uniform vec3 boxLow, boxSize;
uniform vec2 girth, paint;  // low and high
uniform float gain, sheenSize, lowPass;
uniform vec2 picture;       // pixels
uniform float focal;        // pixels
uniform vec2 held;          // tangents that a shape follows at most
out vec2 offset;            // standard deviations from the mean
flat out vec4 color;        // its alpha is the opacity at the mean

uint number;                // of this vertex's Gaussian

ivec2 texelOf(uint n) { return ivec2(int(n % ${ROW}u), int(n / ${ROW}u)); }

struct Splat { vec3 place; vec4 quat; vec3 girths; vec3 paints; };

float signedByte(uint v) { return float(int(v << 24) >> 24); }

Splat unpack(uvec4 t) {
  Splat s;
  s.place = vec3(t.x & 65535u, t.x >> 16, t.y & 65535u) / 65535.0;
  s.quat = vec4(signedByte(t.y >> 16), signedByte(t.y >> 24), signedByte(t.z), signedByte(t.z >> 8));
  s.girths = vec3(t.z >> 16 & 255u, t.z >> 24, t.w & 255u) / 255.0;
  s.paints = vec3(t.w >> 8 & 255u, t.w >> 16 & 255u, t.w >> 24) / 255.0;
  return s;
}

mat3 rotation(vec4 q) { // w x y z
  q /= max(length(q), 1e-9);
  float w = q.x, x = q.y, y = q.z, z = q.w;
  return mat3(1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y + w * z), 2.0 * (x * z - w * y),
              2.0 * (x * y - w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z + w * x),
              2.0 * (x * z + w * y), 2.0 * (y * z - w * x), 1.0 - 2.0 * (x * x + y * y));
}

// Real spherical harmonics with the signs of 3DGS, as in models/splats.py; i counts from degree 1.
float harmonic(int i, vec3 d) {
  float x = d.x, y = d.y, z = d.z, xx = x * x, yy = y * y, zz = z * z;
  switch (i) {
    case 0: return -0.4886025119029199 * y;
    case 1: return 0.4886025119029199 * z;
    case 2: return -0.4886025119029199 * x;
    case 3: return 1.0925484305920792 * x * y;
    case 4: return -1.0925484305920792 * y * z;
    case 5: return 0.31539156525252005 * (2.0 * zz - xx - yy);
    case 6: return -1.0925484305920792 * x * z;
    case 7: return 0.5462742152960396 * (xx - yy);
    case 8: return -0.5900435899266435 * y * (3.0 * xx - yy);
    case 9: return 2.890611442640554 * x * y * z;
    case 10: return -0.4570457994644658 * y * (4.0 * zz - xx - yy);
    case 11: return 0.3731763325901154 * z * (2.0 * zz - 3.0 * xx - 3.0 * yy);
    case 12: return -0.4570457994644658 * x * (4.0 * zz - xx - yy);
    case 13: return 1.445305721320277 * z * (xx - yy);
    default: return -0.5900435899266435 * x * (xx - 3.0 * yy);
  }
}

vec3 sheenOf(vec3 place) {
  int count = (degree + 1) * (degree + 1) - 1;
  vec3 direction = normalize(place - eye), sum = vec3(0.0);
  for (int i = 0; i < count; i++) {
    sum += harmonic(i, direction) * vec3(texelFetch(sheen, texelOf(number * uint(count) + uint(i)), 0).rgb);
  }
  ivec2 at = texelOf(number);
  vec3 gains = mix(vec3(texelFetch(lowGains, at, 0).rgb), vec3(texelFetch(highGains, at, 0).rgb), share);
  return sum * (sheenSize / 127.0) * gains * (gain / 255.0);
}

void main() {
  gl_Position = vec4(2.0, 2.0, 2.0, 1.0); // nowhere
  int rank = gl_InstanceID * ${BLOCK} + (gl_VertexID >> 2);
  if (rank >= sorted) return;
  number = texelFetch(order, texelOf(uint(rank)), 0).r;
  ivec2 at = texelOf(number);
  Splat a = unpack(texelFetch(low, at, 0)), b = unpack(texelFetch(high, at, 0));
  // Girths of 0 mean hidden: the nearer frame decides, and a shape comes from where there is one.
  bool early = any(greaterThan(a.girths, vec3(0.0))), late = any(greaterThan(b.girths, vec3(0.0)));
  if (!(share < 0.5 ? early : late)) return;
  if (!early) a = b;
  if (!late) b = a;
  vec3 place = boxLow + boxSize * mix(a.place, b.place, share);
  vec3 seen = (view * vec4(place, 1.0)).xyz;
  float opacity = float(texelFetch(opacities, at, 0).r) / 255.0;
  if (seen.z <= 0.01 || opacity < 1.0 / 255.0) return;

  vec3 scales = exp(girth.x + (girth.y - girth.x) * mix(a.girths, b.girths, share));
  mat3 axes = mat3(view) * rotation(mix(a.quat, b.quat, share));
  axes = mat3(axes[0] * scales.x, axes[1] * scales.y, axes[2] * scales.z);
  vec2 tangent = seen.xy / seen.z, bent = clamp(tangent, -held, held);
  vec3 ahead = vec3(axes[0].z, axes[1].z, axes[2].z);
  vec3 across = focal / seen.z * (vec3(axes[0].x, axes[1].x, axes[2].x) - bent.x * ahead);
  vec3 down = focal / seen.z * (vec3(axes[0].y, axes[1].y, axes[2].y) - bent.y * ahead);
  float xx = dot(across, across), xy = dot(across, down), yy = dot(down, down);
  // Lagrange's identity: xx yy - xy xy without the difference of large numbers.
  vec3 area = cross(across, down);
  float determinant = dot(area, area) + lowPass * (xx + yy) + lowPass * lowPass;
  xx += lowPass;
  yy += lowPass;

  // The ellipse's axes, as far as its alpha is worth drawing.
  float spread = sqrt(2.0 * log(opacity * 255.0));
  float large = 0.5 * (xx + yy) + sqrt(0.25 * (xx - yy) * (xx - yy) + xy * xy);
  float small = determinant / large;
  vec2 along = xx >= yy ? vec2(large - yy, xy) : vec2(xy, large - xx);
  along = dot(along, along) > 0.0 ? normalize(along) : vec2(1.0, 0.0);
  vec2 middle = focal * tangent + 0.5 * picture;
  vec2 reach = spread * sqrt(vec2(xx, yy));
  if (any(lessThan(middle + reach, vec2(0.0))) || any(greaterThan(middle - reach, picture))) return;

  offset = spread * (vec2(gl_VertexID & 1, gl_VertexID >> 1 & 1) * 2.0 - 1.0);
  middle += offset.x * sqrt(large) * along + offset.y * sqrt(small) * vec2(-along.y, along.x);
  gl_Position = vec4(2.0 * middle.x / picture.x - 1.0, 1.0 - 2.0 * middle.y / picture.y, 0.0, 1.0);
  vec3 shown = paint.x + (paint.y - paint.x) * mix(a.paints, b.paints, share);
  if (degree > 0) shown += sheenOf(place);
  color = vec4(max(shown, 0.0), opacity);
}`;

const SPLAT_FRAGMENT = `#version 300 es
precision highp float;
in vec2 offset;
flat in vec4 color;
out vec4 pixel;
void main() {
  float alpha = min(color.a * exp(-0.5 * dot(offset, offset)), 0.99);
  if (alpha < 1.0 / 255.0) discard;
  pixel = vec4(color.rgb * alpha, alpha);
}`;

const PLAIN_FRAGMENT = `#version 300 es
precision highp float;
uniform vec3 inner, outer;
uniform float cell; // pixels of a checker; 0 = plain
out vec4 pixel;
void main() {
  ivec2 at = ivec2(gl_FragCoord.xy / max(cell, 1.0));
  pixel = vec4(cell > 0.0 && (at.x + at.y) % 2 == 1 ? outer : inner, 1.0);
}`;

export class NoGraphics extends Error {
  constructor() {
    super(t("This browser has no WebGL2, which the 4D view needs: here is one picture instead."));
  }
}

/** Everything of one view that lives on the graphics card. */
export class SplatScene {
  /** `header` is the file's; frames may come later. */
  constructor(canvas, header) {
    // With alpha, pictures without a backdrop can be saved.
    const gl = canvas.getContext("webgl2", { alpha: true, antialias: false, depth: false });
    if (!gl) throw new NoGraphics();
    this.gl = gl;
    this.header = header;
    this.isSoftware = drawsInSoftware(gl);
    this.splats = makeProgram(gl, SPLAT_VERTEX, SPLAT_FRAGMENT);
    this.backdrop = makeProgram(gl, SCREEN_VERTEX, BACKDROP_FRAGMENT);
    this.plain = makeProgram(gl, SCREEN_VERTEX, PLAIN_FRAGMENT);
    this.ground = makeProgram(gl, GROUND_VERTEX, GROUND_FRAGMENT);
    this.nothing = gl.createVertexArray();
    this.rows = new Map(); // texture -> its rows, once it is filled
    this.slots = [0, 1].map(() => ({ f: -1, texels: this.#texture(), gains: this.#texture() }));
    this.opacities = this.#texture();
    this.sheen = this.#texture();
    this.order = this.#texture();
    this.sorted = 0;
    this.#makeQuads();
  }

  #texture() {
    const { gl } = this;
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    // Also where nothing comes, a sampler of whole numbers needs a texture of such.
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8UI, 1, 1, 0, gl.RGBA_INTEGER, gl.UNSIGNED_BYTE, null);
    return texture;
  }

  /** Corners of a block of quads. */
  #makeQuads() {
    const { gl } = this;
    const corners = Uint16Array.from({ length: 6 * BLOCK }, (_, i) => 4 * Math.floor(i / 6) + [0, 1, 2, 2, 1, 3][i % 6]);
    this.quads = gl.createVertexArray();
    gl.bindVertexArray(this.quads);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, corners, gl.STATIC_DRAW);
    gl.bindVertexArray(null);
  }

  /** `count` texels of a kind into a texture: whole rows, then what is left. */
  #fill(texture, inner, format, type, values, count) {
    const { gl } = this;
    const rows = Math.floor(count / ROW);
    const each = values.length / count;
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    if (this.rows.get(texture) !== rows + 1) gl.texImage2D(gl.TEXTURE_2D, 0, inner, ROW, rows + 1, 0, format, type, null);
    this.rows.set(texture, rows + 1);
    if (rows) gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, ROW, rows, format, type, values);
    if (count % ROW) {
      gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, rows, count % ROW, 1, format, type, values, rows * ROW * each);
    }
  }

  setStill({ opacities, sheen }) {
    const { gl } = this;
    const { count, degree } = this.header;
    this.#fill(this.opacities, gl.R8UI, gl.RED_INTEGER, gl.UNSIGNED_BYTE, opacities, count);
    const texels = sheen.length ? sheen : new Int8Array(4);
    const total = degree ? count * ((degree + 1) ** 2 - 1) : 1;
    this.#fill(this.sheen, gl.RGBA8I, gl.RGBA_INTEGER, gl.BYTE, texels, total);
  }

  /** Bring two frames onto the card, unless they are there; the slots of the earlier and the later. */
  #slotsOf(frames, low, high) {
    const taken = this.slots.find((s) => s.f === low) ?? this.slots.find((s) => s.f !== high);
    this.#bring(taken, frames[low], low);
    const other = high === low ? taken : this.slots.find((s) => s !== taken);
    this.#bring(other, frames[high], high);
    return [taken, other];
  }

  #bring(slot, frame, f) {
    if (slot.f === f) return;
    const { gl } = this;
    const { count } = this.header;
    const texels = new Uint32Array(frame.texels.buffer);
    this.#fill(slot.texels, gl.RGBA32UI, gl.RGBA_INTEGER, gl.UNSIGNED_INT, texels, count);
    if (frame.gains) this.#fill(slot.gains, gl.RGBA8UI, gl.RGBA_INTEGER, gl.UNSIGNED_BYTE, frame.gains, count);
    slot.f = f;
  }

  /** Numbers of the Gaussians, the farthest first. */
  setOrder(order) {
    const { gl } = this;
    this.#fill(this.order, gl.R32UI, gl.RED_INTEGER, gl.UNSIGNED_INT, order, order.length);
    this.sorted = order.length;
  }

  /**
   * One picture at a moment [low, high, share] of `frames`. `eye` tells the camera (`view`,
   * `projection`, `eye`, `tan`), `ground` the backdrop; null = none, transparent.
   */
  draw(frames, [low, high, share], eye, ground) {
    const { gl, header } = this;
    const picture = [gl.drawingBufferWidth, gl.drawingBufferHeight];
    const [early, late] = this.#slotsOf(frames, low, high);
    gl.viewport(0, 0, ...picture);
    gl.disable(gl.DEPTH_TEST);
    gl.disable(gl.BLEND);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (ground) this.#drawGround(eye, ground);
    const textures = {
      low: early.texels, high: late.texels, lowGains: early.gains, highGains: late.gains,
      opacities: this.opacities, sheen: this.sheen, order: this.order,
    };
    for (const [name, unit] of Object.entries(UNITS)) {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, textures[name]);
    }
    gl.activeTexture(gl.TEXTURE0);
    const aspect = picture[0] / picture[1];
    const held = [eye.tan * aspect, eye.tan].map((v) => v * (1 + BESIDE));
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.splats({
      ...UNITS, ...eye, share, picture, held, sorted: this.sorted, degree: header.degree, focal: picture[1] / 2 / eye.tan,
      boxLow: header.low, boxSize: header.size, girth: header.girth, paint: header.paint,
      gain: header.gain, sheenSize: header.sheen, lowPass: header.low_pass,
    });
    gl.bindVertexArray(this.quads);
    gl.drawElementsInstanced(gl.TRIANGLES, 6 * BLOCK, gl.UNSIGNED_SHORT, 0, Math.ceil(this.sorted / BLOCK));
    gl.bindVertexArray(null);
  }

  #drawGround(eye, ground) {
    const { gl } = this;
    gl.bindVertexArray(this.nothing);
    if (!ground.line) {
      this.plain(ground);
      gl.drawArrays(gl.TRIANGLES, 0, 3);
      return;
    }
    this.backdrop(ground);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.ground({ ...eye, ...ground });
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  }

  dispose() {
    // Giving the context back frees all that hangs on it; browsers hold only 16.
    this.gl.getExtension("WEBGL_lose_context")?.loseContext();
  }
}
