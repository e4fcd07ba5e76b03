const DEBOUNCE = 250; // ms without a key before a text is sent
const LONGEST_WAIT = 20; // s that a busy server is waited for
const LONG_TEXT = 280; // characters, above which the type is smaller
const ALTERNATIVES = 5;
const KEY = "kvx-api-key";
const WORD = { className: "word", role: "button", ariaHasPopup: "menu", tabIndex: -1 };
const DETECT = "auto";

const at = (id) => document.getElementById(id);
const [source, mirror, output, menu] = ["source", "mirror", "translation", "menu"].map(at);
const [from, to, modelSelect, swapButton] = ["source-language", "target-language", "model", "swap"].map(at);

const service = { models: [], pairs: {}, detection: false, limit: Infinity, loaded: false };
const shown = { translation: null, of: "", asked: {}, words: [], byNode: new Map(), current: 0 };
const storage = storageOf();
let timer = 0;
let running = null; // the AbortController of the translation under way
let retry = null; // what "Try again" does
let opened = null; // the open menu's word and AbortController

// Requests

class Problem extends Error {
  constructor(status, detail, wait = 1) {
    super(detail);
    Object.assign(this, { status, wait, passes: [429, 503].includes(status) && wait <= LONGEST_WAIT });
  }
}

function storageOf() {
  try {
    return sessionStorage;
  } catch {
    return {}; // it is off: the key is known until the page is left
  }
}

async function send(path, body, signal) {
  const key = storage[KEY];
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const { status, headers } = response;
  const found = await response.json().catch(() => null);
  const text = found?.detail || found?.title || `The server answered with the status ${status}.`;
  return new Problem(status, text, secondsOf(headers.get("Retry-After")));
}

function secondsOf(header) {
  const seconds = Number(header ?? 1);
  return seconds >= 0 ? seconds : 1; // a date is not waited for
}

async function patiently(action, signal) {
  try {
    return await action();
  } catch (error) {
    if (!error.passes) throw error;
    await pause(error.wait * 1000, signal);
    return action();
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const wake = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(wake);
      reject(signal.reason);
    });
  });
}

const fetched = (path, body, signal) => patiently(async () => (await send(path, body, signal)).json(), signal);

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split(/\r?\n\r?\n/);
    buffer = blocks.pop();
    for (const block of blocks) yield eventOf(block);
  }
}

function eventOf(block) {
  const fields = { event: "message", data: "" };
  for (const line of block.split(/\r?\n/)) {
    const [, name, value] = /^(\w+): ?(.*)$/.exec(line) ?? [];
    if (name === "data") fields.data += value;
    else if (name === "event") fields.event = value;
  }
  return fields;
}

async function streamed(body, signal, onText) {
  const response = await send("/v1/translate", body, signal);
  let text = "";
  for await (const { event, data } of events(response)) {
    if (event === "token") onText((text += JSON.parse(data).text));
    else if (event === "result") return JSON.parse(data).translation;
    else if (event === "error") throw streamProblem(JSON.parse(data));
  }
  throw new Problem(0, "The connection ended before the translation was complete.");
}

const streamProblem = ({ status, detail, title }) => new Problem(status, detail || title);

// Models and languages

const languagesOf = (model, side) => model[`${side}_languages`] ?? [];
const speaks = (model, side, code) => languagesOf(model, side).some((one) => one.code === code);
const hasLanguages = (model) => languagesOf(model, "source").length > 0 && languagesOf(model, "target").length > 0;
const ofPair = (a, b) => service.models.filter((one) => speaks(one, "source", a) && speaks(one, "target", b));

const reaches = (a, b) => ofPair(a, b).length > 0 || (service.pairs[a] ?? []).includes(b); // perhaps through a pivot

function listed(models, side) {
  const languages = models.filter(hasLanguages).flatMap((one) => languagesOf(one, side));
  const names = new Map(languages.map(({ code, name }) => [code, { value: code, label: name || code }]));
  return [...names.values()].sort((a, b) => a.label.localeCompare(b.label));
}

function targetsFrom(code) {
  if (code === DETECT) return listed(service.models, "target");
  const all = listed(service.models, "target").filter((one) => reaches(code, one.value));
  const others = all.filter((one) => one.value !== code);
  return others.length ? others : all;
}

function fill(select, options, wanted) {
  const previous = wanted ?? select.value;
  select.replaceChildren(...options.map(({ value, label }) => new Option(label, value)));
  if (options.some((one) => one.value === previous)) select.value = previous;
}

function fillSources() {
  const options = listed(service.models, "source");
  if (service.detection && options.length) options.unshift({ value: DETECT, label: "Detect language" });
  fill(from, options);
  const none = options.length === 0;
  for (const node of [at("from"), swapButton, to.parentElement]) node.hidden = none;
}

function fillTargets(wanted) {
  const options = targetsFrom(from.value);
  const own = navigator.languages.map((tag) => tag.split("-")[0]);
  const familiar = own.find((code) => code !== from.value && options.some((one) => one.value === code));
  fill(to, options, wanted ?? (to.value || familiar));
  fillModels();
}

function fillModels() {
  const nameless = service.models.filter((one) => !hasLanguages(one));
  const detecting = from.value === DETECT;
  const options = (detecting ? [] : ofPair(from.value, to.value)).concat(nameless).map(({ name }) => ({ value: name, label: name }));
  if (detecting) options.unshift({ value: "", label: "Automatic" });
  fill(modelSelect, options);
  at("model-choice").hidden = options.length < 2 && from.options.length > 0;
  updateChoices();
}

function updateChoices() {
  const byName = isByName();
  from.disabled = to.disabled = byName;
  swapButton.disabled = byName || !reaches(to.value, spoken());
  source.lang = tagOf(spoken());
  showFacts();
}

const chosenModel = () => service.models.find((one) => one.name === modelSelect.value);
const candidates = () => (chosenModel() ? [chosenModel()] : service.models.filter((one) => speaks(one, "target", to.value)));
const tagOf = (code) => (code ?? "").replaceAll("_", "-");

function isByName() {
  const model = chosenModel();
  return model !== undefined && !hasLanguages(model);
}

function spoken() {
  return from.value === DETECT ? shown.translation?.source_language : from.value;
}

function choices() {
  const languages = isByName() ? {} : { source_language: from.value, target_language: to.value };
  return { ...(modelSelect.value && { model: modelSelect.value }), ...languages };
}

function showDetected() {
  const option = [...from.options].find((one) => one.value === DETECT);
  if (!option) return;
  const code = from.value === DETECT && shown.translation?.detected?.language;
  const name = code && [...from.options].find((one) => one.value === code)?.text;
  option.text = code ? `${name ?? code} (detected)` : "Detect language";
}

function showFacts() {
  const name = shown.translation?.model ?? chosenModel()?.name;
  const model = service.models.find((one, _, all) => one.name === name || all.length === 1);
  at("facts").textContent = model ? [`Model ${model.name}`, model.precision, proofOf(model)].filter(Boolean).join(" · ") : "";
}

function proofOf({ proof }) {
  if (!proof?.verified) return "not proven";
  const error = proof.max_abs_error;
  return error > 0 ? `proven to be within ${powerOf(error)} of PyTorch` : "proven equal to PyTorch";
}

function powerOf(number) {
  const [factor, exponent] = number.toExponential(1).split("e");
  const raised = [...String(Number(exponent))].map((one) => (one === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[one])).join("");
  return `${factor} × 10${raised}`;
}

// Translation

function schedule() {
  clearTimeout(timer);
  running?.abort();
  timer = setTimeout(translate, DEBOUNCE);
}

async function translate() {
  clearTimeout(timer);
  running?.abort();
  if (!service.loaded) return;
  const text = source.value;
  if (!text.trim()) forget();
  if (!text.trim() || refused(text)) return;
  const controller = new AbortController();
  running = controller;
  setBusy(true);
  try {
    await translateText(text, controller.signal);
  } catch (error) {
    if (running === controller && !controller.signal.aborted) fail(error, translate);
  } finally {
    if (running === controller) setBusy(false);
  }
}

async function translateText(text, signal) {
  const asked = choices();
  const align = candidates().every((one) => one.attention);
  const body = { texts: [text], ...asked, format: "text", ...(align && { align }), stream: true };
  const show = perFrame(showStream, signal);
  const translation = await patiently(() => streamed(body, signal, show), signal);
  signal.throwIfAborted();
  tell("");
  hideKeyForm();
  accept(translation, text, asked);
}

function refused(text) {
  const over = lengthOf(text) - service.limit;
  if (over <= 0) return false;
  setBusy(false);
  output.classList.add("old");
  tell(`The text is ${grouped(over)} ${over === 1 ? "character" : "characters"} too long. The limit is ${grouped(service.limit)}.`);
  return true;
}

function perFrame(action, signal) {
  let latest = null;
  return (value) => {
    if (latest === null) {
      requestAnimationFrame(() => {
        if (!signal.aborted && running?.signal === signal) action(latest);
        latest = null;
      });
    }
    latest = value;
  };
}

function accept(translation, text, asked) {
  running = null;
  setBusy(false);
  let place = 0;
  for (const sentence of translation.sentences) {
    const found = text.indexOf(sentence.source, place);
    sentence.from = found;
    if (found >= 0) place = found + sentence.source.length;
    sentence.links = linksOf(sentence);
  }
  Object.assign(shown, { translation, of: text, asked, current: 0 });
  showTranslation();
  showDetected();
  updateChoices();
  announce(output.textContent.length < 400 ? output.textContent : "The translation is ready.");
}

function forget() {
  running = null;
  setBusy(false);
  tell("");
  announce("");
  Object.assign(shown, { translation: null, of: "" });
  showTranslation();
  showDetected();
  updateChoices();
}

function setBusy(busy) {
  at("target-pane").classList.toggle("busy", busy);
  output.ariaBusy = busy;
}

function fail(error, action) {
  if (shown.translation) showTranslation();
  else if (output.textContent) output.classList.add("old");
  if (error.status === 401) askForKey(error);
  else tell(messageOf(error), action);
}

function messageOf(error) {
  if (error instanceof Problem) return error.message;
  if (error instanceof TypeError) return "The server cannot be reached. Your text is kept.";
  return "The answer could not be read. Your text is kept.";
}

const announce = (text) => (at("announcement").textContent = text);

function tell(message, action = null) {
  retry = action;
  at("problem").classList.toggle("shown", message !== "");
  at("status").textContent = message;
  at("again").hidden = !(message && action);
}

function askForKey(error) {
  at("key-form").hidden = false;
  announce(error.message);
  tell(storage[KEY] ? error.message : "");
  if (document.activeElement === document.body) at("key").focus();
}

function hideKeyForm() {
  const form = at("key-form");
  if (form.contains(document.activeElement)) source.focus();
  form.hidden = true;
}

// What is shown

function showStream(text) {
  closeMenu();
  const before = shown.translation ? textOf(shown.translation) : "";
  output.classList.remove("old");
  output.replaceChildren(text);
  if (before.length > text.length && before.startsWith(text)) output.append(make("span", before.slice(text.length), { className: "old" }));
}

const textOf = ({ gaps, sentences }) => sentences.reduce((all, one, i) => all + one.text + gaps[i + 1], gaps[0]);
const make = (tag, textContent, properties) => Object.assign(document.createElement(tag), { textContent }, properties);

function showTranslation() {
  closeMenu();
  shown.words = [];
  shown.byNode.clear();
  const { translation } = shown;
  const all = document.createDocumentFragment();
  output.lang = tagOf(shown.asked.target_language);
  translation?.sentences.forEach((sentence, i) => {
    all.append(translation.gaps[i]);
    addSentence(all, sentence);
  });
  if (translation) all.append(translation.gaps.at(-1));
  all.normalize();
  output.replaceChildren(all);
  output.classList.toggle("old", translation !== null && shown.of !== source.value);
  moveTo(Math.min(shown.current, shown.words.length - 1), false);
  at("hint").textContent = hintOf(translation);
  at("copy").hidden = !output.textContent;
  mark();
}

function addSentence(all, sentence) {
  let done = 0;
  for (const { start, end, begin } of wordsOf(sentence.text, output.lang)) {
    const node = make("span", sentence.text.slice(start, end), WORD);
    shown.byNode.set(node, shown.words.push({ node, sentence, start, end, begin }) - 1);
    all.append(sentence.text.slice(done, start), node);
    done = end;
  }
  all.append(sentence.text.slice(done));
}

function hintOf(translation) {
  if (!translation) return "";
  const reasons = translation.sentences.map((one) => one.finish_reason);
  if (reasons.includes("length")) return "A sentence is cut off at the model's limit.";
  if (reasons.some((one) => one && one !== "end")) return "A sentence is not complete.";
  return shown.words.length ? "Choose a word to see other ways to go on." : "";
}

// Words stand between spaces, and `begin` is before the punctuation ahead of one. Of scripts without spaces the browser
// knows the words.
const UNSPACED = /[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]/u;

function wordsOf(text, lang) {
  return [...text.matchAll(/\S+/gu)].flatMap(({ 0: chunk, index }) => {
    const parts = UNSPACED.test(chunk) ? segmentsOf(chunk, lang) : [{ segment: chunk, index: 0 }];
    return parts.flatMap((part) => trimmed(part.segment, index + part.index));
  });
}

function trimmed(chunk, begin) {
  const start = chunk.search(/[^\p{P}\p{S}\p{M}\p{C}]/u);
  if (start < 0) return [];
  const [whole] = /.*[^\p{P}\p{S}]/su.exec(chunk);
  return [{ begin, start: begin + start, end: begin + whole.length }];
}

function segmentsOf(chunk, lang) {
  try {
    return [...new Intl.Segmenter(lang || undefined, { granularity: "word" }).segment(chunk)];
  } catch {
    return [{ segment: chunk, index: 0 }]; // the code is no language tag, or the browser is old
  }
}

function update() {
  const text = source.value;
  const length = lengthOf(text);
  const { limit } = service;
  at("count").textContent = [length, limit].filter(Number.isFinite).map(grouped).join(" / ");
  at("count").classList.toggle("over", length > limit);
  at("clear").hidden = text === "";
  for (const node of [source, mirror, output]) node.classList.toggle("long", length > LONG_TEXT);
  mark();
}

function lengthOf(text) {
  let length = 0;
  for (const _ of text) length += 1; // characters, of which some are two units of a string
  return length;
}

const grouped = (number) => number.toLocaleString("en");

// Attention

// Where each piece stands in the text, as far as the pieces can be followed.
function spansOf(pieces, text) {
  const spans = [];
  let place = 0;
  for (const piece of pieces) {
    place += /^\s*/u.exec(text.slice(place, place + 64))[0].length;
    const bare = piece.replaceAll("▁", " ").replace(/@@$|<\/w>$/u, "").trim();
    const found = [bare, bare.replaceAll("Ġ", " ").trim()].find((one) => text.startsWith(one, place));
    if (found === undefined && !/^<.*>$/u.test(piece)) break;
    spans.push(found ? { start: place, end: place + found.length } : null);
    place += found?.length ?? 0;
  }
  return spans;
}

function linksOf({ source: original, text, tokens, source_tokens: pieces, alignment }) {
  if (!tokens || !pieces || !alignment) return [];
  const places = spansOf(pieces, original);
  const links = spansOf(tokens, text).map((span, i) => span && places[alignment[i]] && { ...span, to: places[alignment[i]] });
  return links.filter(Boolean);
}

const overlap = (a, b) => a.start < b.end && b.start < a.end;

function attendedBy({ sentence, start, end }) {
  if (sentence.from < 0 || shown.of !== source.value) return [];
  const places = sentence.links.filter((link) => overlap(link, { start, end })).map((link) => link.to);
  const words = wordsOf(sentence.source, source.lang);
  const whole = places.flatMap((place) => {
    const found = words.filter((word) => overlap(word, place));
    return found.length ? found : [place];
  });
  return whole.map((one) => ({ start: one.start + sentence.from, end: one.end + sentence.from }));
}

function mark(word = null) {
  const text = source.value;
  const all = document.createDocumentFragment();
  let done = 0;
  for (const { start, end } of (word ? attendedBy(word) : []).sort((a, b) => a.start - b.start)) {
    if (start < done) continue;
    all.append(text.slice(done, start), make("mark", text.slice(start, end)));
    done = end;
  }
  all.append(`${text.slice(done)}\u200b`); // an empty last line is as high as in the box
  mirror.replaceChildren(all);
}

const wordAt = (node) => shown.words[shown.byNode.get(node)];
const markFocused = () => mark(wordAt(document.activeElement) ?? opened?.word);

// Moving between words

function moveTo(index, focus = true) {
  if (shown.words.length === 0) return;
  const before = shown.words[shown.current];
  if (before) before.node.tabIndex = -1;
  shown.current = Math.max(0, index);
  const { node } = shown.words[shown.current];
  node.tabIndex = 0;
  if (focus) node.focus();
}

function moveLine(direction) {
  const boxOf = (i) => shown.words[i].node.getBoundingClientRect();
  const here = boxOf(shown.current);
  const apart = (a, b) => Math.abs(a.top - b.top) > here.height / 2;
  let best = null;
  for (let i = shown.current + direction; i in shown.words; i += direction) {
    const box = boxOf(i);
    if (best && apart(box, best.box)) break;
    const distance = Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
    if (apart(box, here) && !(distance >= best?.distance)) best = { i, distance, box };
  }
  if (best) moveTo(best.i);
}

function onWordKey(event) {
  const index = shown.byNode.get(event.target);
  if (index === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  const forwards = getComputedStyle(output).direction === "rtl" ? -1 : 1;
  const last = shown.words.length - 1;
  const step = (by) => moveTo(Math.min(last, Math.max(0, index + by)));
  const actions = {
    ArrowRight: () => step(forwards),
    ArrowLeft: () => step(-forwards),
    ArrowDown: () => moveLine(1),
    ArrowUp: () => moveLine(-1),
    Home: () => moveTo(0),
    End: () => moveTo(last),
    Enter: () => openMenu(shown.words[index]),
    " ": () => openMenu(shown.words[index]),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

// The menu of alternatives

async function openMenu(word) {
  closeMenu();
  const controller = new AbortController();
  opened = { word, controller };
  word.node.ariaExpanded = "true";
  menu.hidden = false;
  menu.lang = output.lang;
  noteInMenu("Looking for other ways to go on…");
  menu.focus({ preventScroll: true });
  mark(word);
  try {
    const answer = await fetched("/v1/alternatives", alternativesBody(word), controller.signal);
    if (opened?.controller === controller) showAlternatives(word, answer.alternatives);
  } catch (error) {
    if (opened?.controller === controller) noteInMenu(messageOf(error), "bad");
  }
}

function alternativesBody({ sentence, begin }) {
  const { model, source_language: language } = shown.translation;
  const { target_language: target, model: named } = shown.asked;
  const languages = target && { source_language: language ?? shown.asked.source_language, target_language: target };
  const prefix = sentence.text.slice(0, begin);
  return { text: sentence.source, prefix, count: ALTERNATIVES, model: model ?? named, ...languages };
}

function showAlternatives(word, alternatives) {
  const others = new Map(alternatives.map((one) => [one.text, one]));
  others.delete(word.sentence.text);
  const items = [...others.values()].map((other) => itemOf(word, other));
  if (items.length === 0) return noteInMenu("There is no other way to go on from here.");
  fillMenu(items);
  items[0].focus({ preventScroll: true });
}

function fillMenu(nodes) {
  menu.replaceChildren(...nodes);
  placeMenu();
}

function noteInMenu(text, className = "") {
  announce(text);
  fillMenu([make("p", text, { className, role: "presentation", lang: "en" })]);
}

function itemOf(word, other) {
  const prefix = word.sentence.text.slice(0, word.begin);
  const rest = (other.text.startsWith(prefix) ? other.text.slice(prefix.length) : other.text).trimStart();
  const first = rest.slice(0, wordsOf(rest, output.lang)[0]?.end ?? rest.length);
  const item = make("button", "", { type: "button", role: "menuitem", tabIndex: -1, dir: "auto" });
  item.append(make("b", first), rest ? rest.slice(first.length) : "(the end)");
  item.addEventListener("click", () => choose(word, other));
  return item;
}

function choose({ sentence, begin }, { text, finish_reason }) {
  sentence.links = sentence.links.filter((link) => link.end <= begin && text.startsWith(sentence.text.slice(0, begin)));
  Object.assign(sentence, { text, finish_reason });
  showTranslation();
  const changed = shown.words.findIndex((one) => one.sentence === sentence && one.end > begin);
  moveTo(changed < 0 ? shown.current : changed);
}

function placeMenu() {
  const edge = 12;
  const word = opened.word.node.getBoundingClientRect();
  const { clientWidth, clientHeight } = document.documentElement;
  const { offsetWidth: width, offsetHeight: height } = menu;
  const left = Math.max(edge, Math.min(word.left - 8, clientWidth - width - edge));
  const above = word.bottom + height + edge > clientHeight && word.top > height + edge;
  menu.style.left = `${left + scrollX}px`;
  menu.style.top = `${(above ? word.top - height - 6 : word.bottom + 6) + scrollY}px`;
}

function closeMenu(focusWord = false) {
  if (!opened) return;
  const { word, controller } = opened;
  opened = null;
  controller.abort();
  word.node.ariaExpanded = null;
  if (focusWord) word.node.focus();
  menu.hidden = true;
  menu.replaceChildren();
  markFocused();
}

function onMenuKey(event) {
  const items = [...menu.querySelectorAll("button")];
  const index = items.indexOf(document.activeElement);
  const focus = (i) => items.at(i % items.length)?.focus();
  const actions = {
    ArrowDown: () => focus(index + 1),
    ArrowUp: () => focus(index < 0 ? -1 : index - 1),
    Home: () => focus(0),
    End: () => focus(-1),
    Escape: () => closeMenu(true),
  };
  if (event.key === "Tab") closeMenu(true); // the browser then goes on from the word
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

// Buttons

function swap() {
  const target = spoken();
  if (shown.translation && shown.of === source.value) source.value = output.textContent;
  from.value = to.value;
  forget();
  fillTargets(target);
  update();
  translate();
}

async function copy() {
  const writing = navigator.clipboard?.writeText(output.textContent).then(() => true);
  const done = await (writing ?? Promise.reject()).catch(copySelected);
  announce((at("copy").textContent = done ? "Copied" : "Not copied"));
  setTimeout(() => (at("copy").textContent = "Copy"), 1600);
}

// The way without HTTPS
function copySelected() {
  const selection = getSelection();
  selection.selectAllChildren(output);
  const done = document.execCommand("copy");
  selection.removeAllRanges();
  return done;
}

function clear() {
  source.value = "";
  update();
  translate();
  source.focus();
}

async function load() {
  try {
    const { models, pairs = {}, detection, limits } = await fetched("/v1/models");
    Object.assign(service, { models, pairs, detection, limit: limits?.characters ?? Infinity, loaded: true });
    at("card").classList.add("ready");
    tell(models.length ? "" : "This service has no model.");
    if (!source.value.trim()) hideKeyForm();
    fillSources();
    fillTargets();
    update();
    if (source.value) translate();
  } catch (error) {
    fail(error, load);
  }
}

function useKey(event) {
  event.preventDefault();
  storage[KEY] = at("key").value.trim();
  load();
}

function changed(refill) {
  refill();
  shown.of = null; // what is shown is of other languages
  showDetected();
  translate();
}

source.addEventListener("input", (event) => {
  update();
  if (!event.isComposing) schedule();
});
source.addEventListener("compositionend", schedule);
from.addEventListener("change", () => changed(fillTargets));
to.addEventListener("change", () => changed(fillModels));
modelSelect.addEventListener("change", () => changed(updateChoices));
swapButton.addEventListener("click", swap);
at("copy").addEventListener("click", copy);
at("clear").addEventListener("click", clear);
at("again").addEventListener("click", () => retry?.());
at("key-form").addEventListener("submit", useKey);

output.addEventListener("click", ({ target }) => {
  const index = shown.byNode.get(target);
  if (index === undefined || !getSelection().isCollapsed) return;
  moveTo(index, false);
  openMenu(shown.words[index]);
});
output.addEventListener("keydown", onWordKey);
output.addEventListener("focusin", ({ target }) => {
  if (shown.byNode.has(target)) moveTo(shown.byNode.get(target), false);
  markFocused();
});
output.addEventListener("focusout", () => mark(opened?.word));
output.addEventListener("pointerover", ({ target }) => (wordAt(target) ? mark(wordAt(target)) : markFocused()));
output.addEventListener("pointerleave", markFocused);
menu.addEventListener("keydown", onMenuKey);
menu.addEventListener("focusout", ({ relatedTarget }) => {
  if (relatedTarget && !menu.contains(relatedTarget)) closeMenu();
});
document.addEventListener("pointerdown", ({ target }) => {
  if (opened && !menu.contains(target)) closeMenu();
});
addEventListener("resize", () => opened && placeMenu());

update();
load();
