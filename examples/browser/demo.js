// The page and its worker in one module. Each model file has a worker of its own: the page stays responsive while a model
// computes, and the memory of a model that is no longer wanted is given back, which WebAssembly itself never does.

import { unpack } from "./unpack.js";

const LIBRARY = new URL("node_modules/@huggingface/transformers/dist/transformers.min.js", import.meta.url).href;
// The runtime of ONNX for processors alone: half the size of the one with WebGPU that the library asks for by default.
const RUNTIME = new URL("node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded", import.meta.url).href;
// The same without the library, in which nothing makes a session of one's own.
const UNPACKING = new URL("node_modules/onnxruntime-web/dist/ort.wasm.min.mjs", import.meta.url).href;
const MODELS = new URL("models/", import.meta.url).pathname; // to the library, a path is what is local
const BATCH = 8; // lines
const ROUNDS = 10; // of every query, when files are compared
const MOST_TOKENS = 128; // of an answer

// ---------------------------------------------------------------------------------------------------------- the worker

function work() {
  let model, task, heap, TextStreamer;

  // What the runtime allocates is counted where it is made: nothing else tells a page how much memory a model takes.
  WebAssembly.Memory = class extends WebAssembly.Memory {
    constructor(limits) {
      super(limits);
      heap = this;
    }
  };
  const memory = () => heap?.buffer.byteLength ?? 0;

  async function bytesOf(address, report) {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`There is no ${address}.`);
    let bytes = 0;
    const count = new TransformStream({
      transform(chunk, stream) {
        report({ bytes: (bytes += chunk.length) });
        stream.enqueue(chunk);
      },
    });
    return new Uint8Array(await new Response(answer.body.pipeThrough(count)).arrayBuffer());
  }

  async function load(entry, file, { threads, unpacking }, report) {
    const start = performance.now();
    const paths = { mjs: `${RUNTIME}.mjs`, wasm: `${RUNTIME}.wasm` };
    const importing = import(LIBRARY);
    // Rather than the library's progress_callback, for which it asks for every file twice.
    let given = { model: await bytesOf(`${MODELS}${entry.name}/onnx/${file.file}`, report), externalData: [], memory: 0 };
    const fetched = performance.now();
    if (unpacking) given = await unpack(given.model, { module: UNPACKING, ...paths }, (done, of) => report({ done, of }));
    const unpacked = performance.now();

    const library = await importing;
    ({ TextStreamer } = library);
    const { env, pipeline } = library;
    // Every file comes from where the page came from, and is fetched anew, so that what is shown is what a visitor meets.
    Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: MODELS });
    Object.assign(env, { useBrowserCache: false, useWasmCache: false });
    Object.assign(env.backends.onnx.wasm, { wasmPaths: paths, numThreads: threads });
    env.fetch = async (address, options) =>
      given && `${address}`.endsWith(".onnx") ? new Response(given.model) : fetch(address, options);
    const config = await (await fetch(`${MODELS}${entry.name}/${entry.config}`)).json();
    const kind = entry.task === "chat" ? "text-generation" : "feature-extraction";
    const options = { config, device: "wasm", dtype: file.dtype };
    if (given.externalData.length) options.session_options = { externalData: given.externalData };
    task = await pipeline(kind, entry.name, options);
    task.tokenizer.chat_template ??= entry.template;
    const beside = given.externalData.reduce((sum, { data }) => sum + data.length, 0);
    const most = Math.max(given.memory, beside + memory());
    const parts = given.externalData.length;
    given = undefined; // the runtime has its own by now
    model = entry;
    const times = { fetch: fetched - start, unpack: unpacked - fetched, load: performance.now() - start };
    return { ...times, parts, memory: most, threads };
  }

  // Rows of the answer are the texts' embeddings, of unit length.
  async function embed(texts) {
    const start = performance.now();
    const output = await task(texts, { pooling: model.pooling, normalize: true });
    return { rows: output.tolist(), ms: performance.now() - start, memory: memory() };
  }

  async function generate(messages, most, report) {
    const times = [];
    const streamer = new TextStreamer(task.tokenizer, {
      skip_prompt: true,
      skip_special_tokens: true,
      callback_function: (text) => report({ text }),
      token_callback_function: () => times.push(performance.now()),
    });
    const start = performance.now();
    const prompt = task.tokenizer.chat_template ? messages : messages.map(({ content }) => content).join("\n");
    await task(prompt, { max_new_tokens: most, do_sample: false, streamer });
    // The time to the first token is that of the prompt's own pass.
    const tokens = times.length;
    const rate = tokens > 1 ? ((tokens - 1) * 1000) / (times.at(-1) - times[0]) : null;
    return { tokens, first: times[0] - start, rate, memory: memory() };
  }

  const calls = { load, embed, generate };
  onmessage = async ({ data: { id, call, values } }) => {
    try {
      postMessage({ id, value: await calls[call](...values, (progress) => postMessage({ id, progress })) });
    } catch (error) {
      postMessage({ id, error: `${error?.message ?? error}` });
    }
  };
}

// One loaded model file.
class Engine {
  #worker = new Worker(import.meta.url, { type: "module" });
  #waiting = new Map();
  #next = 0;

  constructor(entry, file) {
    Object.assign(this, { entry, file });
    this.#worker.onmessage = ({ data }) => {
      const { resolve, reject, report } = this.#waiting.get(data.id);
      if (data.progress) return report?.(data.progress);
      this.#waiting.delete(data.id);
      return "error" in data ? reject(new Error(data.error)) : resolve(data.value);
    };
    this.#worker.onerror = (event) => {
      for (const { reject } of this.#waiting.values()) reject(new Error(event.message ?? "the worker has failed"));
    };
  }

  #call(call, values, report) {
    const id = this.#next++;
    this.#worker.postMessage({ id, call, values });
    return new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject, report }));
  }

  async load(settings, report) {
    this.loaded = await this.#call("load", [this.entry, this.file, settings], report);
    return this.loaded;
  }

  async #embed(texts, prompt) {
    const result = await this.#call("embed", [texts.map((text) => prompt + text)]);
    this.loaded.memory = Math.max(this.loaded.memory, result.memory);
    return result;
  }

  // Lines of like length go together, since a batch is as long as its longest.
  async embedLines(lines, report = () => {}) {
    const order = lines.map((_, i) => i).sort((a, b) => lines[a].length - lines[b].length);
    const rows = [];
    for (let start = 0; start < order.length; start += BATCH) {
      const places = order.slice(start, start + BATCH);
      const result = await this.#embed(places.map((i) => lines[i]), this.entry.prompts[1]);
      places.forEach((place, i) => (rows[place] = result.rows[i]));
      report(Math.min(start + BATCH, lines.length), lines.length);
    }
    return rows;
  }

  async embedQuery(query) {
    const { rows, ms } = await this.#embed([query], this.entry.prompts[0]);
    return { row: rows[0], ms };
  }

  async generate(messages, most, report) {
    const result = await this.#call("generate", [messages, most], report);
    this.loaded.memory = Math.max(this.loaded.memory, result.memory);
    return result;
  }

  close() {
    this.#worker.terminate();
  }
}

// ------------------------------------------------------------------------------------------------------------ the page

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const median = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;
const milliseconds = (ms) => `${ms.toFixed(ms < 100 ? 1 : 0)} ms`;

function page() {
  const $ = (id) => document.getElementById(id);
  const asked = new URLSearchParams(location.search); // ?query=…&threads=…&unpack=no
  const threads = crossOriginIsolated ? Number(asked.get("threads")) || Math.min(4, navigator.hardwareConcurrency) : 1;
  const linesOf = () => $("text").value.split("\n").map((line) => line.trim()).filter(Boolean);

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  // What a tab says of itself; every failure ends here.
  async function guarded(status, run) {
    try {
      status.className = "status";
      return await run((text) => (status.textContent = text));
    } catch (error) {
      status.className = "status failed";
      status.textContent = error.message;
      throw error;
    }
  }

  async function open(entry, file, say) {
    const engine = new Engine(entry, file);
    say(`Loading ${file.file} …`);
    try {
      await engine.load({ threads, unpacking: $("unpack").checked }, ({ bytes, done, of }) => {
        if (bytes < file.bytes) say(`Fetching ${megabytes(bytes)} of ${megabytes(file.bytes)}`);
        else say(of ? `Unpacking: ${done} of ${of}` : "Loading …");
      });
    } catch (error) {
      engine.close();
      throw error;
    }
    return engine;
  }

  function choices(select, entries) {
    select.replaceChildren(...entries.map((entry, i) => element("option", { value: i, textContent: entry.name })));
    select.disabled = entries.length < 2;
  }

  // ---- search: one record a file of the chosen model, { engine, rows, times, agreement } ----

  let files = [];
  let shown = []; // the lines that the rows belong to
  let busy = Promise.resolve();

  function tabulate(entry) {
    $("files").replaceChildren(
      ...entry.files.map((file, i) => {
        const { engine, times, agreement } = files[i] ?? {};
        const cells = [
          file.file,
          megabytes(file.bytes),
          engine ? seconds(engine.loaded.load) : "–",
          engine ? megabytes(engine.loaded.memory) : "–",
          times?.length ? milliseconds(median(times)) : "–",
          agreement === undefined ? "–" : agreement.toFixed(4),
        ];
        return element("tr", {}, ...cells.map((textContent) => element("td", { textContent })));
      }),
    );
    $("compare").hidden = entry.files.length < 2;
  }

  async function prepare(entry, i, say) {
    files[i] ??= { engine: await open(entry, entry.files[i], say), times: [] };
    files[i].rows ??= await files[i].engine.embedLines(shown, (done, of) => say(`Reading lines: ${done} of ${of}`));
    tabulate(entry);
    return files[i];
  }

  function readText() {
    const lines = linesOf();
    if (lines.join("\n") !== shown.join("\n")) files.forEach((each) => delete each.rows);
    shown = lines;
  }

  // Give the lines by how near they are to the query, nearest first, as { line, score, place }.
  async function search(query, entry = chosen()) {
    return guarded($("search-status"), async (say) => {
      readText();
      const record = await prepare(entry, 0, say);
      const { row, ms } = await record.engine.embedQuery(query);
      record.times.push(ms);
      const hits = record.rows.map((other, place) => ({ line: shown[place], score: dot(row, other), place }));
      hits.sort((a, b) => b.score - a.score);
      tabulate(entry);
      say(`${shown.length} lines, ${milliseconds(ms)} for this query`);
      return { hits, ms, row };
    });
  }

  async function show() {
    const query = $("query").value.trim();
    if (!query) return;
    const { hits } = await search(query);
    $("hits").replaceChildren(
      ...hits.slice(0, 6).map(({ line, score }) =>
        element(
          "li",
          {},
          element("span", { className: "line", textContent: line }),
          element("meter", { min: 0, max: 1, value: Math.max(0, score), title: score.toFixed(3) }),
          element("span", { className: "score", textContent: score.toFixed(2) }),
        ),
      ),
    );
  }

  // All files of the model on the same queries, taking turns, so that whatever else the machine does meets all alike.
  async function compare(queries, entry = chosen()) {
    return guarded($("search-status"), async (say) => {
      readText();
      for (let i = 0; i < entry.files.length; i++) await prepare(entry, i, say);
      const first = {};
      files.forEach((each) => (each.times = []));
      for (let round = 0; round <= ROUNDS; round++) {
        say(`Comparing: round ${round} of ${ROUNDS}`);
        for (const query of queries) {
          for (const [i, each] of files.entries()) {
            const { ms } = await each.engine.embedQuery(query);
            if (round) each.times.push(ms); // round 0 warms up
          }
        }
      }
      const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
      files.forEach((each) => (each.agreement = mean(each.rows.map((row, i) => dot(row, files.at(-1).rows[i])))));
      tabulate(entry);
      say(`${queries.length} queries, ${ROUNDS} rounds, in turns; agreement is the mean cosine with the last file`);
      return entry.files.map((file, i) => ({
        ...file,
        ...files[i].engine.loaded,
        query: median(files[i].times),
        // Of times that were taken one right after the other: steadier than a ratio of medians.
        relative: median(files[i].times.map((time, at) => time / files.at(-1).times[at])),
        agreement: files[i].agreement,
      }));
    });
  }

  // ---- chat ----

  let talker;
  let messages = [];

  function bubble(role, text) {
    const made = element("div", { className: `bubble ${role}`, textContent: text });
    $("messages").append(made);
    made.scrollIntoView({ block: "nearest" });
    return made;
  }

  async function say(text, most = MOST_TOKENS, entry = chatting()) {
    return guarded($("chat-status"), async (tell) => {
      talker ??= await open(entry, entry.files[0], tell);
      messages.push({ role: "user", content: text });
      bubble("user", text);
      const answer = bubble("assistant", "");
      tell("Reading …");
      const result = await talker.generate(messages, most, ({ text: more }) => (answer.textContent += more));
      messages.push({ role: "assistant", content: answer.textContent });
      const { load, memory } = talker.loaded;
      const count = result.tokens === 1 ? "1 token" : `${result.tokens} tokens`;
      const rate = result.rate && `, then ${result.rate < 10 ? result.rate.toPrecision(2) : result.rate.toFixed()} tokens a second`;
      const parts = [
        megabytes(talker.file.bytes),
        `loaded in ${seconds(load)}`,
        `${megabytes(memory)} of memory`,
        `${count}, the first after ${seconds(result.first)}${rate ?? ""}`, // a single token says nothing of speed
      ];
      tell(parts.join(" · "));
      return { ...talker.file, ...result, ...talker.loaded, text: answer.textContent };
    });
  }

  // ---- all of it ----

  let models = { search: [], chat: [] };
  const chosen = () => models.search[Number($("search-model").value)];
  const chatting = () => models.chat[Number($("chat-model").value)];

  function tab(name) {
    for (const each of ["search", "chat"]) {
      $(each).hidden = each !== name;
      $(`${each}-tab`).setAttribute("aria-selected", each === name);
    }
    if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  }

  function reset() {
    files.forEach((each) => each.engine.close());
    files = [];
    $("hits").replaceChildren();
    tabulate(chosen());
  }

  function forget() {
    talker?.close();
    talker = undefined;
    messages = [];
    $("messages").replaceChildren();
  }

  // One thing at a time: a query that comes while another is answered waits for it.
  const queue = (run) => (busy = busy.then(run, run).catch((error) => console.error(error)));

  async function start() {
    const answer = await fetch(`${MODELS}index.json`);
    if (!answer.ok) throw new Error("There is no models/index.json: see the first lines of serve.py.");
    const entries = await answer.json();
    models = Object.groupBy(entries, ({ task }) => task);
    models.search ??= [];
    models.chat ??= [];
    const count = threads === 1 ? "1 thread" : `${threads} threads`;
    $("threads").textContent = crossOriginIsolated ? count : `${count}: the server sends no isolation headers`;
    for (const name of ["search", "chat"]) {
      choices($(`${name}-model`), models[name]);
      $(`${name}-empty`).hidden = models[name].length > 0;
      $(`${name}-panel`).hidden = models[name].length === 0;
    }
    if (models.search.length) {
      tabulate(chosen());
      queue(show);
    }
    return models;
  }

  $("search-tab").onclick = () => tab("search");
  $("chat-tab").onclick = () => tab("chat");
  onhashchange = () => tab(location.hash === "#chat" ? "chat" : "search");
  onhashchange();
  $("search-form").onsubmit = (event) => {
    event.preventDefault();
    queue(show);
  };
  $("text").onchange = () => queue(show);
  $("search-model").onchange = () => queue(() => (reset(), show()));
  $("compare").onclick = () => queue(() => compare([$("query").value, ...linesOf().slice(0, 9)]));
  $("file").onchange = async () => {
    $("text").value = await $("file").files[0].text();
    queue(show);
  };
  $("chat-model").onchange = forget;
  $("unpack").onchange = () => {
    forget();
    if (models.search.length) queue(() => (reset(), show()));
  };
  $("chat-form").onsubmit = (event) => {
    event.preventDefault();
    const text = $("message").value.trim();
    $("message").value = "";
    if (text) queue(() => say(text));
  };

  $("unpack").checked = asked.get("unpack") !== "no";
  if (asked.has("query")) $("query").value = asked.get("query");
  // For tests and benchmarks, which drive the page as a visitor does and read off what it shows.
  window.demo = { ready: start(), idle: () => busy, search, compare, say, rows: () => files[0].rows };
  window.demo.ready.catch((error) => ($("search-status").textContent = error.message));
}

if (typeof document === "undefined") work();
else page();
