/** What the 3D views share on the graphics card: programs, the backdrop, the ground. */

import { t } from "./words.js";

export const GROUNDS = {
  dark: { inner: [0.17, 0.18, 0.2], outer: [0.085, 0.09, 0.105], line: [1, 1, 1, 0.16], shade: [0.06, 0.063, 0.07] },
  light: { inner: [0.97, 0.972, 0.975], outer: [0.8, 0.81, 0.83], line: [0, 0, 0, 0.18], shade: [0.66, 0.67, 0.69] },
};

/** A triangle that covers the picture; needs no buffers. */
export const SCREEN_VERTEX = `#version 300 es
out vec2 uv;
void main() {
  uv = vec2(gl_VertexID == 1 ? 2.0 : 0.0, gl_VertexID == 2 ? 2.0 : 0.0);
  gl_Position = vec4(uv * 2.0 - 1.0, 0.0, 1.0);
}`;

export const BACKDROP_FRAGMENT = `#version 300 es
precision highp float;
in vec2 uv;
uniform vec3 inner, outer;
out vec4 pixel;
void main() {
  vec2 d = uv - vec2(0.5, 0.35);
  pixel = vec4(mix(inner, outer, smoothstep(0.0, 0.75, length(d))), 1.0);
}`;

export const GROUND_VERTEX = `#version 300 es
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

export const GROUND_FRAGMENT = `#version 300 es
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

/** Whether a processor draws instead of a graphics card. */
export function drawsInSoftware(gl) {
  const info = gl.getExtension("WEBGL_debug_renderer_info");
  const name = String(gl.getParameter(info ? info.UNMASKED_RENDERER_WEBGL : gl.RENDERER));
  return /swiftshader|llvmpipe|software|basic render/i.test(name);
}

/** A function that makes the program current and sets its uniforms by name. */
export function makeProgram(gl, vertex, fragment) {
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
    throw new Error(t("The graphics driver refused to draw this view: update it, or use the node's picture."));
  }
  const places = new Map();
  const count = gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS) ?? 0;
  for (let i = 0; i < count; i++) {
    const { name, type } = gl.getActiveUniform(program, i);
    places.set(name, [gl.getUniformLocation(program, name), type]);
  }
  const setters = {
    [gl.FLOAT]: "uniform1f", [gl.INT]: "uniform1i", [gl.SAMPLER_2D]: "uniform1i",
    [gl.INT_SAMPLER_2D]: "uniform1i", [gl.UNSIGNED_INT_SAMPLER_2D]: "uniform1i",
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
