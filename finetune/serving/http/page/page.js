// Chat with the served models: one column for each model shown, each with a conversation of its own.
// Every text of a model or a server becomes a text node, never HTML. Nothing is stored.

const find = selector => document.querySelector(selector);
const settings = find('#settings form');
const columns = [];
let running = 0;

// ---- requests

class Refusal extends Error {}

const headers = () => {
  const key = settings.elements.key.value.trim();
  return key ? {Authorization: `Bearer ${key}`} : {};
};

/** Fetch a path of the API; throws a Refusal with a sentence for every answer that is no success. */
async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, {...options, headers: {...headers(), ...options.headers}});
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refusal('The server cannot be reached. Is it running?');
  }
  if (response.ok) return response;
  const body = await response.text();
  let message = body.slice(0, 500);
  try {
    message = JSON.parse(body).error.message ?? message;
  } catch { /* not JSON, or without an error: the text itself is shown */ }
  if (response.status === 401) {
    find('#settings').open = true;
    throw new Refusal('The server needs its API key: enter it under Settings.');
  }
  throw new Refusal(`${message || response.statusText} (HTTP ${response.status})`);
}

/** Yield the JSON of each event of a stream; throws if the stream ends before `[DONE]`. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Refusal('The server ended the answer before it was complete.');
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines.map(line => line.trimEnd()).filter(line => line.startsWith('data:'))) {
      const data = line.slice(5).trim();
      if (data === '[DONE]') return;
      yield JSON.parse(data);
    }
  }
}

/** The settings of a request; those left empty are the server's. */
function chosen() {
  const body = {};
  for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) {
    const input = settings.elements[name];
    if (!input.checkValidity()) throw new Refusal(`${name}: ${input.validationMessage}`);
    if (input.value !== '') body[name] = Number(input.value);
  }
  return body;
}

// ---- a column

const made = (tag, className, text = '') => {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
};

class Column {
  constructor() {
    this.node = find('#column').content.firstElementChild.cloneNode(true);
    [this.select, this.log, this.stats] = ['select', '.log', '.stats'].map(each => this.node.querySelector(each));
    this.node.querySelector('[data-do=copy]').addEventListener('click', () => this.copy());
    this.node.querySelector('[data-do=clear]').addEventListener('click', () => this.clear());
    this.turns = [];
    this.abort = null;
    find('#columns').append(this.node);
  }

  offer(names, number) {
    const before = this.select.value;
    this.select.replaceChildren(...names.map(name => new Option(name, name)));
    this.select.value = names.includes(before) ? before : names[Math.min(number, names.length - 1)] ?? '';
  }

  show(role, who, text = '') {
    const turn = made('div', `turn ${role}`);
    const body = made('div', 'text', text);
    turn.append(made('div', 'who', who), body);
    this.log.append(turn);
    this.log.scrollTop = this.log.scrollHeight;
    return [turn, body];
  }

  fail(text) {
    const node = made('p', 'error', text);
    node.setAttribute('role', 'alert');
    this.log.append(node);
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** Send a text and show the answer as it comes; returns whether there is one. */
  async send(text) {
    const model = this.select.value;
    const system = settings.elements.system.value;
    const turns = [...this.turns, {role: 'user', content: text}];
    const messages = system.trim() ? [{role: 'system', content: system}, ...turns] : turns;
    this.log.querySelectorAll('.error').forEach(node => node.remove());
    this.stats.textContent = '';
    const [asked] = this.show('user', 'you', text);
    const [turn, body] = this.show('assistant', model);
    const abort = this.abort = new AbortController();
    const answer = {text: '', pieces: 0, tokens: null, began: performance.now(), first: null, last: null, finish: null};
    let problem = null;
    try {
      const response = await ask('v1/chat/completions', {
        method: 'POST',
        signal: abort.signal,
        headers: {'Content-Type': 'application/json'},
        body: JSON.stringify({model, messages, stream: true, stream_options: {include_usage: true}, ...chosen()}),
      });
      for await (const event of events(response)) this.take(event, answer, body);
    } catch (error) {
      if (error.name === 'AbortError') answer.finish = 'stopped';
      else problem = error instanceof Refusal ? error.message : `The answer cannot be read: ${error.message}`;
    }
    if (abort !== this.abort) return true; // Cleared meanwhile.
    this.abort = null;
    this.stats.textContent = described(answer);
    if (answer.text) this.turns = [...turns, {role: 'assistant', content: answer.text}];
    else if (answer.finish === null || answer.finish === 'stopped') [asked, turn].forEach(node => node.remove());
    if (problem) this.fail(problem);
    return !problem;
  }

  take(event, answer, body) {
    if (event.error) throw new Refusal(event.error.message ?? 'The server failed.');
    if (event.usage) answer.tokens = event.usage.completion_tokens;
    const choice = event.choices?.[0];
    if (!choice) return;
    answer.finish = choice.finish_reason ?? answer.finish;
    const piece = choice.delta?.content;
    if (!piece) return;
    answer.last = performance.now();
    answer.first ??= answer.last;
    answer.text += piece;
    answer.pieces += 1;
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    body.append(piece);
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
    this.stats.textContent = described(answer);
  }

  clear() {
    this.abort?.abort();
    this.abort = null;
    this.turns = [];
    this.log.replaceChildren();
    this.stats.textContent = '';
  }

  async copy() {
    const text = this.turns.map(turn => `${turn.role}: ${turn.content}`).join('\n\n');
    try {
      await navigator.clipboard.writeText(text);
      this.stats.textContent = 'The conversation is copied.';
    } catch { // Browsers allow it on https and on this machine alone.
      getSelection().selectAllChildren(this.log);
      this.stats.textContent = 'The conversation is selected: copy it with Ctrl+C.';
    }
  }
}

/** Tokens, time to the first one and tokens per second after it, as far as they are known. */
function described({pieces, tokens, began, first, last, finish}) {
  const count = tokens ?? pieces;
  const parts = [];
  if (first !== null) {
    parts.push(`${count} tokens`, `first after ${((first - began) / 1000).toFixed(2)} s`);
    if (count > 1 && last > first) parts.push(`${((count - 1) / (last - first) * 1000).toFixed(1)} tokens/s`);
  }
  const end = {length: 'ended at max tokens', stopped: 'stopped'}[finish];
  return [...parts, ...end ? [end] : []].join(' · ');
}

// ---- the page

async function loadModels() {
  try {
    const response = await ask('v1/models');
    const models = (await response.json()).data;
    const names = [...models.filter(model => model.parent), ...models.filter(model => !model.parent)].map(model => model.id);
    columns.forEach((column, number) => column.offer(names, number));
    find('#status').textContent = names.length === 1 ? '1 model' : `${names.length} models`;
  } catch (error) {
    find('#status').textContent = error.message;
  }
}

function updateButtons() {
  find('#send').hidden = running > 0;
  find('#stop').hidden = running === 0;
}

async function submit() {
  const input = find('#text');
  const text = input.value;
  if (!text.trim() || running || columns.some(column => !column.select.value)) return; // The models are not known yet.
  input.value = '';
  running = columns.length;
  updateButtons();
  const answered = await Promise.all(columns.map(column => column.send(text).finally(() => {
    running -= 1;
    updateButtons();
  })));
  if (!answered.includes(true) && !input.value) input.value = text; // Nobody answered: it can be sent again.
}

function compare() {
  if (find('#compare').checked) columns.push(new Column());
  else for (const column of columns.splice(1)) {
    column.clear();
    column.node.remove();
  }
  loadModels();
}

find('#composer').addEventListener('submit', event => {
  event.preventDefault();
  submit();
});
find('#text').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
const stop = () => columns.forEach(column => column.abort?.abort());
find('#stop').addEventListener('click', stop);
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') stop();
});
find('#compare').addEventListener('change', compare);
settings.addEventListener('submit', event => event.preventDefault());
settings.elements.key.addEventListener('change', loadModels);
columns.push(new Column());
loadModels();
