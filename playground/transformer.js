// The model, as in transformer.py and tinygrad_lite/functional.py, token by token with a cache.
"use strict";

// COLUMNS ARE POSITIONS. Activations are matrices with one column for each of B lines that are
// read side by side, stored row by row in a Float32Array: feature f of line b is x[f * B + b].
// Letters as in Python: D features, F hidden features, H heads of d = D / H features, V tokens.

const RMS_EPS = 1e-6;
const ROPE_BASE = 10000;

// weight @ x: (rows, columns) @ (columns, B) -> (rows, B). The inner loop runs over lines, which
// lie side by side in memory. It adds four products at a time, in half the time that one by one
// takes; build.py makes sure that `columns` is a multiple of 4.
function matmul(weight, x, batch) {
  const columns = x.length / batch;
  const rows = weight.length / columns;
  const out = new Float32Array(rows * batch);
  for (let row = 0; row < rows; row++) {
    const start = row * batch;
    for (let column = 0; column < columns; column += 4) {
      const first = row * columns + column;
      const w0 = weight[first];
      const w1 = weight[first + 1];
      const w2 = weight[first + 2];
      const w3 = weight[first + 3];
      for (let b = 0; b < batch; b++) {
        const i = column * batch + b;
        out[start + b] +=
          w0 * x[i] + w1 * x[i + batch] + w2 * x[i + 2 * batch] + w3 * x[i + 3 * batch];
      }
    }
  }
  return out;
}

function add(x, y) {
  return x.map((value, i) => value + y[i]);
}

// Each column divided by its root mean square.
function rmsNorm(x, batch) {
  const features = x.length / batch;
  const out = new Float32Array(x.length);
  for (let b = 0; b < batch; b++) {
    let sum = 0;
    for (let i = b; i < x.length; i += batch) {
      sum += x[i] * x[i];
    }
    const rms = Math.sqrt(sum / features + RMS_EPS);
    for (let i = b; i < x.length; i += batch) {
      out[i] = x[i] / rms;
    }
  }
  return out;
}

// silu(gate) * up: (2F, B) = [gate; up] -> (F, B).
function swiglu(gateUp) {
  const half = gateUp.length / 2;
  const out = new Float32Array(half);
  for (let i = 0; i < half; i++) {
    const gate = gateUp[i];
    out[i] = (gate / (1 + Math.exp(-gate))) * gateUp[half + i];
  }
  return out;
}

// The numbers of a float16 text: little-endian, in base64, as build.py's `pack` writes them.
function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const out = new Float32Array(bytes.length / 2);
  for (let i = 0; i < out.length; i++) {
    const bits = view.getUint16(2 * i, true);
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = (bits & 1023) / 1024;
    out[i] = sign * (exponent === 0 ? fraction * 2 ** -14 : (1 + fraction) * 2 ** (exponent - 15));
  }
  return out;
}

// diag(scale) applied to the columns of a matrix: the learned scale of a norm is multiplied into
// the matrix that follows.
function scaleColumns(weight, scale) {
  return weight.map((w, i) => w * scale[i % scale.length]);
}

class Transformer {
  // config: the sizes, as in Python. weights: all of them, in the order of a checkpoint.
  constructor(config, weights) {
    this.config = config;
    const { vocab_size: V, d_model: D, d_hidden: F } = config;
    let start = 0;
    const take = (n) => weights.subarray(start, (start += n));
    this.embedding = take(D * V);
    this.blocks = [];
    for (let i = 0; i < config.n_layers; i++) {
      const attentionNorm = take(D);
      const qkv = scaleColumns(take(3 * D * D), attentionNorm);
      const attentionOut = take(D * D);
      const mlpNorm = take(D);
      const gateUp = scaleColumns(take(2 * F * D), mlpNorm);
      const down = take(D * F);
      this.blocks.push({ qkv, attentionOut, gateUp, down });
    }
    const norm = take(D);
    this.head = scaleColumns(take(V * D), norm);
  }

  // Keys and values of B lines: for each layer two arrays (MAX_LEN, D, B), filled step by step.
  emptyCache(batch) {
    const size = MAX_LEN * this.config.d_model * batch;
    const empty = () => ({ keys: new Float32Array(size), values: new Float32Array(size) });
    return this.blocks.map(empty);
  }

  // Logits of the token after `position`, (V, B). ids: the token of each line at `position`, (B,).
  // cache: holds the positions before, and gets this one.
  step(ids, position, cache) {
    const { vocab_size: V, d_model: D } = this.config;
    const batch = ids.length;
    let x = new Float32Array(D * batch);
    for (let f = 0; f < D; f++) {
      for (let b = 0; b < batch; b++) {
        x[f * batch + b] = this.embedding[f * V + ids[b]];
      }
    }
    this.blocks.forEach((block, i) => {
      const qkv = matmul(block.qkv, rmsNorm(x, batch), batch); // (3D, B)
      const mixed = this.attention(qkv, position, cache[i], batch); // (D, B)
      x = add(x, matmul(block.attentionOut, mixed, batch));
      const gateUp = matmul(block.gateUp, rmsNorm(x, batch), batch); // (2F, B)
      x = add(x, matmul(block.down, swiglu(gateUp), batch));
    });
    return matmul(this.head, rmsNorm(x, batch), batch);
  }

  // functional.cached_attention: (3D, B) = [q; k; v] -> (D, B).
  attention(qkv, position, { keys, values }, batch) {
    const { d_model: D, n_heads: H } = this.config;
    const d = D / H;
    const size = D * batch; // of q, of k, of v, and of one position in the cache
    const q = this.rotate(qkv.subarray(0, size), position, batch);
    keys.set(this.rotate(qkv.subarray(size, 2 * size), position, batch), position * size);
    values.set(qkv.subarray(2 * size), position * size);

    const out = new Float32Array(size);
    const weights = new Float64Array(position + 1);
    for (let head = 0; head < H; head++) {
      for (let b = 0; b < batch; b++) {
        const first = head * d * batch + b; // the first feature of this head and line
        const end = first + d * batch;
        let largest = -Infinity;
        for (let t = 0; t <= position; t++) {
          let score = 0;
          for (let i = first; i < end; i += batch) {
            score += q[i] * keys[t * size + i];
          }
          weights[t] = score / Math.sqrt(d);
          largest = Math.max(largest, weights[t]);
        }
        let total = 0;
        for (let t = 0; t <= position; t++) {
          weights[t] = Math.exp(weights[t] - largest);
          total += weights[t];
        }
        for (let i = first; i < end; i += batch) {
          let sum = 0;
          for (let t = 0; t <= position; t++) {
            sum += weights[t] * values[t * size + i];
          }
          out[i] = sum / total;
        }
      }
    }
    return out;
  }

  // Turn each pair of features (f, f + d/2) of every head by the angle position * base^(-2f / d).
  rotate(x, position, batch) {
    const { d_model: D, n_heads: H } = this.config;
    const d = D / H;
    const out = new Float32Array(x.length);
    for (let head = 0; head < H; head++) {
      for (let f = 0; f < d / 2; f++) {
        const angle = position * ROPE_BASE ** ((-2 * f) / d);
        const cos = Math.cos(angle);
        const sin = Math.sin(angle);
        for (let b = 0; b < batch; b++) {
          const first = (head * d + f) * batch + b;
          const second = first + (d / 2) * batch;
          out[first] = x[first] * cos - x[second] * sin;
          out[second] = x[second] * cos + x[first] * sin;
        }
      }
    }
    return out;
  }

  // Logits after each token of one line: an array of (V,), one for each id.
  logits(ids) {
    const cache = this.emptyCache(1);
    return ids.map((id, position) => this.step([id], position, cache));
  }
}
