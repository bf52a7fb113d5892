// A file that unpacks itself, unpacked before its session is made: an ordinary ONNX model of int8 weights.
//
//     import { unpack } from "./unpack.js";
//     const { model, externalData } = await unpack(bytes, { module, mjs, wasm });
//     const session = await InferenceSession.create(model, { externalData });
//
// A session keeps all that it folds until everything is folded, 20 bytes a weight and more. Here each matrix is computed by a
// session of its own, of nothing but the operators that decode it, in a worker that ends afterwards and so gives its memory
// back. What comes of it is what the session would have folded. It is the same in Python in
// hf_offline_compress/export/onnx/unpacking.py, where more is said of each step.

// Bytes of constants: what is computed from fewer is left to the session; and shares a session of its own with others.
const SMALL = 64;
const TOGETHER = 1 << 16;
// Bytes of a weight that lies beside the model, from where the runtime takes it without copies between.
const BESIDE = 1 << 12;
const NOT_FOLDED = new Set(
  "RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Multinomial DequantizeLinear".split(" "),
);

// Numbers of fields in onnx.proto.
const MODEL = { graph: 7 };
const GRAPH = { node: 1, name: 2, constant: 5, input: 11, output: 12, type: 13 };
const NODE = { input: 1, output: 2, operator: 4, attribute: 5, domain: 7 };
const ATTRIBUTE = { graph: 6, graphs: 11 };
const TENSOR = { shape: 1, dtype: 2, name: 8, data: 9, beside: 13, place: 14 };
const VALUE = { name: 1 };
const DTYPES = {
  ...{ float32: 1, uint8: 2, int8: 3, uint16: 4, int16: 5, int32: 6, int64: 7 },
  ...{ bool: 9, float16: 10, float64: 11, uint32: 12, uint64: 13 },
};

// ------------------------------------------------------------------------------------------------------------- protobuf

// The fields of a message, as they lie in it: { number, value, raw }. Numbers of other kinds than varints are passed over.
function fieldsOf(message) {
  const fields = [];
  let at = 0;
  const varint = () => {
    let [value, scale, byte] = [0, 1, 0];
    do {
      byte = message[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte & 128);
    return value;
  };
  while (at < message.length) {
    const start = at;
    const tag = varint();
    let value;
    if (tag % 8 === 0) value = varint();
    else if (tag % 8 === 1) at += 8;
    else if (tag % 8 === 5) at += 4;
    else if (tag % 8 === 2) {
      const length = varint();
      value = message.subarray(at, at + length);
      at += length;
    } else at = Infinity;
    if (!(at <= message.length) || tag < 8) throw new Error("This is no ONNX file.");
    fields.push({ number: (tag - (tag % 8)) / 8, value, raw: message.subarray(start, at) });
  }
  return fields;
}

const all = (fields, number) => fields.filter((field) => field.number === number).map((field) => field.value);
const first = (fields, number) => all(fields, number)[0];
const textOf = (bytes = new Uint8Array()) => new TextDecoder().decode(bytes);
const texts = (fields, number) => all(fields, number).map(textOf);

function joined(parts) {
  const bytes = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

function varint(value) {
  const bytes = [];
  for (; value >= 128; value = Math.floor(value / 128)) bytes.push((value % 128) + 128);
  return Uint8Array.from([...bytes, value]);
}

// A field of a message: a number, a text, or bytes that may be a message themselves.
function field(number, value) {
  if (typeof value === "number") return joined([varint(number * 8), varint(value)]);
  const bytes = typeof value === "string" ? new TextEncoder().encode(value) : value;
  return joined([varint(number * 8 + 2), varint(bytes.length), bytes]);
}

// ---------------------------------------------------------------------------------------------------------------- graph

// The names of all values that a node takes, those of graphs within it included.
function taken(node) {
  const names = texts(node, NODE.input).filter(Boolean);
  for (const attribute of all(node, NODE.attribute).map(fieldsOf)) {
    for (const graph of [...all(attribute, ATTRIBUTE.graph), ...all(attribute, ATTRIBUTE.graphs)].map(fieldsOf)) {
      names.push(...all(graph, GRAPH.node).flatMap((inner) => taken(fieldsOf(inner))));
      names.push(...all(graph, GRAPH.output).map((value) => textOf(first(fieldsOf(value), VALUE.name))));
    }
  }
  return names;
}

function isFolded(node) {
  const inner = all(node, NODE.attribute).some((attribute) =>
    fieldsOf(attribute).some(({ number }) => number === ATTRIBUTE.graph || number === ATTRIBUTE.graphs),
  );
  const domain = textOf(first(node, NODE.domain));
  return ["", "ai.onnx"].includes(domain) && !NOT_FOLDED.has(textOf(first(node, NODE.operator))) && !inner;
}

// What in a model is computed from constants alone, and taken by what is not.
class Packed {
  constructor(bytes) {
    this.model = fieldsOf(bytes);
    this.graph = all(this.model, MODEL.graph).flatMap(fieldsOf);
    const names = (number) => all(this.graph, number).map((value) => textOf(first(fieldsOf(value), VALUE.name)));
    this.outputs = names(GRAPH.output);
    const given = new Set(names(GRAPH.input)); // which a caller may pass otherwise
    this.tensors = all(this.graph, GRAPH.constant).map((bytes) => {
      const fields = fieldsOf(bytes);
      return { bytes, fields, name: textOf(first(fields, TENSOR.name)) };
    });
    this.constants = new Map(this.tensors.filter(({ name }) => !given.has(name)).map((each) => [each.name, each]));
    this.nodes = all(this.graph, GRAPH.node).map((bytes) => {
      const fields = fieldsOf(bytes);
      return { bytes, taken: taken(fields), outputs: texts(fields, NODE.output), folded: isFolded(fields) };
    });
    this.made = new Map(); // name of a value → its node
    const asked = new Set(this.outputs);
    for (const node of this.nodes) {
      if (node.folded && node.taken.every((name) => this.constants.has(name) || this.made.has(name)))
        node.outputs.forEach((name) => this.made.set(name, node));
      else node.taken.forEach((name) => asked.add(name));
    }
    const values = [...asked].filter((name) => this.made.has(name));
    this.groups = together(merged(values.map((name) => this.#group(name))));
  }

  #group(name) {
    const group = { names: [name], nodes: new Set(), constants: new Set() };
    const waiting = [name];
    while (waiting.length) {
      const value = waiting.pop();
      const node = this.made.get(value);
      if (!node) group.constants.add(value);
      else if (!group.nodes.has(node)) {
        group.nodes.add(node);
        waiting.push(...node.taken);
      }
    }
    group.size = [...group.constants].reduce((sum, each) => sum + sizeOf(this.constants.get(each)), 0);
    return group;
  }

  #message(graph) {
    const others = this.model.filter(({ number }) => number !== MODEL.graph).map(({ raw }) => raw);
    return joined([...others, field(MODEL.graph, joined(graph))]);
  }

  // The model of a group alone.
  part(group) {
    return this.#message([
      field(GRAPH.name, "part"),
      ...this.nodes.filter((node) => group.nodes.has(node)).map(({ bytes }) => field(GRAPH.node, bytes)),
      ...[...group.constants].map((name) => field(GRAPH.constant, this.constants.get(name).bytes)),
      ...group.names.map((name) => field(GRAPH.output, field(VALUE.name, name))),
    ]);
  }

  // The model without the groups and all that they alone take, but with their values, which lie beside it.
  whole(values) {
    const done = new Set(this.groups.flatMap(({ names }) => names));
    const asked = new Set(this.outputs);
    const nodes = this.nodes.toReversed().filter((node) => {
      const needed = node.outputs.some((name) => asked.has(name) && !done.has(name));
      if (needed) node.taken.forEach((name) => asked.add(name));
      return needed;
    });
    const changed = [GRAPH.node, GRAPH.constant, GRAPH.type];
    const externalData = [];
    const kept = this.tensors.filter(({ name }) => asked.has(name)).map(({ bytes, fields }) => {
      const data = first(fields, TENSOR.data);
      const head = fields.filter(({ number }) => number !== TENSOR.data).map(({ raw }) => raw);
      return data ? stored(head, data, externalData) : bytes;
    });
    const made = values.map(([head, data]) => stored(head, data, externalData));
    const graph = [
      ...this.graph.filter(({ number }) => !changed.includes(number)).map(({ raw }) => raw),
      ...nodes.toReversed().map(({ bytes }) => field(GRAPH.node, bytes)),
      ...[...kept, ...made].map((tensor) => field(GRAPH.constant, tensor)),
    ];
    return { model: this.#message(graph), externalData };
  }
}

// Bytes of a constant; shapes and places, which are no codes, count for nothing.
function sizeOf({ bytes, fields }) {
  return [DTYPES.int64, DTYPES.bool].includes(first(fields, TENSOR.dtype)) ? 0 : bytes.length;
}

// Groups of which none is computed on the way to another, as scales may be; small ones are left out.
function merged(groups) {
  const found = [];
  for (const group of groups.toSorted((a, b) => b.nodes.size - a.nodes.size)) {
    const other = found.find((each) => group.nodes.isSubsetOf(each.nodes));
    if (other) other.names.push(...group.names);
    else if (group.size >= SMALL) found.push(group);
  }
  return found;
}

// Groups of which small ones are one.
function together(groups) {
  const found = [];
  for (const group of groups.toSorted((a, b) => a.size - b.size)) {
    const last = found.at(-1);
    if (last && last.size + group.size <= TOGETHER) {
      last.names.push(...group.names);
      last.nodes = last.nodes.union(group.nodes);
      last.constants = last.constants.union(group.constants);
      last.size += group.size;
    } else found.push(group);
  }
  return found;
}

// A tensor as a message; of a large one the bytes are put beside the model.
function stored(head, data, externalData) {
  if (data.length < BESIDE) return joined([...head, field(TENSOR.data, data)]);
  const path = `weights-${externalData.length}`;
  // In a buffer of its own, to be handed over.
  externalData.push({ path, data: data.length === data.buffer.byteLength ? data : data.slice() });
  const entries = Object.entries({ location: path, offset: "0", length: `${data.length}` });
  const beside = entries.map(([key, value]) => field(TENSOR.beside, joined([field(1, key), field(2, value)])));
  return joined([...head, ...beside, field(TENSOR.place, 1)]);
}

// ------------------------------------------------------------------------------------------------------------ unpacking

// Give the model of a file, and the weights that lie beside it, as the runtime's sessions take them; with the memory that
// this has taken at most. A file without codes comes back as it was.
//
// bytes: of the file; they are handed over, and are gone afterwards.
// runtime: { module, mjs, wasm }, addresses of onnxruntime-web: ort.wasm.min.mjs, ort-wasm-simd-threaded.mjs and .wasm.
// report: called with how many of how many parts are done.
export async function unpack(bytes, runtime, report = () => {}) {
  const worker = new Worker(import.meta.url, { type: "module", name: "unpack" });
  try {
    return await new Promise((resolve, reject) => {
      worker.onmessage = ({ data: { done, of, error, result } }) => {
        if (error) reject(new Error(error));
        else if (result) resolve(result);
        else report(done, of);
      };
      worker.onerror = (event) => reject(new Error(event.message ?? "the worker has failed"));
      worker.postMessage({ bytes, runtime }, [bytes.buffer]);
    });
  } finally {
    worker.terminate();
  }
}

// Compute the values of a group: parts of tensors, [everything but the bytes, the bytes].
async function valuesOf(packed, group, ort) {
  const session = await ort.InferenceSession.create(packed.part(group), {
    executionProviders: ["wasm"],
    // What is no longer needed is given back at once; folding would keep it.
    graphOptimizationLevel: "disabled",
    enableCpuMemArena: false,
    enableMemPattern: false,
  });
  const values = await session.run({}, group.names);
  await session.release();
  return group.names.map((name) => {
    const { type, dims, data } = values[name];
    const head = [...dims.map((size) => field(TENSOR.shape, size)), field(TENSOR.dtype, DTYPES[type])];
    return [[...head, field(TENSOR.name, name)], new Uint8Array(data.buffer, data.byteOffset, data.byteLength)];
  });
}

async function work({ bytes, runtime }) {
  let heap;
  WebAssembly.Memory = class extends WebAssembly.Memory {
    constructor(limits) {
      super(limits);
      heap = this;
    }
  };
  const packed = new Packed(bytes);
  const values = [];
  if (packed.groups.length) {
    const ort = await import(runtime.module);
    ort.env.wasm.wasmPaths = { mjs: runtime.mjs, wasm: runtime.wasm };
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "error";
    for (const [done, group] of packed.groups.entries()) {
      postMessage({ done, of: packed.groups.length });
      values.push(...(await valuesOf(packed, group, ort)));
    }
  }
  const whole = packed.groups.length ? packed.whole(values) : { model: bytes, externalData: [] };
  const memory = (heap?.buffer.byteLength ?? 0) + whole.externalData.reduce((sum, { data }) => sum + data.length, 0);
  const own = [whole.model, ...whole.externalData.map(({ data }) => data)].map(({ buffer }) => buffer);
  postMessage({ result: { ...whole, memory } }, own);
}

if (globalThis.name === "unpack" && typeof document === "undefined")
  onmessage = ({ data }) => work(data).catch((error) => postMessage({ error: `${error?.message ?? error}` }));
