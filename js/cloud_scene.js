/** A cloud of points on the graphics card: discs with creases, a shadow on the ground, the source camera. */

import {
  BACKDROP_FRAGMENT,
  GROUND_FRAGMENT,
  GROUND_VERTEX,
  SCREEN_VERTEX,
  drawsInSoftware,
  makeProgram,
} from "./graphics.js";
import { t } from "./words.js";

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
uniform int mode;         // 0 colour, 1 normals, 2 seen, 3 depth; -1 = shadow on the ground
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

/** Everything that lives on the graphics card. */
export class CloudScene {
  constructor(canvas) {
    this.gl = canvas.getContext("webgl2", { alpha: false, antialias: false });
    if (!this.gl) {
      throw new Error(t("This browser has no WebGL2, which the 3D view needs: connect 'turntable' to Preview Image instead."));
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
