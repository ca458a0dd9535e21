// A slider that tells the kernel what a hand does, and nothing else: a value from the kernel is shown, never answered.
// Its elements carry the names of ipywidgets' own slider, whose style sheet the page has.
const PAGE = 5;
const HTML = `<label class="widget-label"></label>
<div class="slider-container"><div class="slider noUi-target noUi-ltr noUi-horizontal"><div class="noUi-base">
<div class="noUi-connects"><div class="noUi-connect"></div></div>
<div class="noUi-origin"><div class="noUi-handle noUi-handle-lower" role="slider" aria-orientation="horizontal"></div>
</div></div></div></div><div class="widget-readout" contenteditable="true" role="textbox"></div>`;

function spell(value, format) {
  const [, digits, kind] = /^\.?(\d*)(\w?)$/.exec(format) || [null, "", ""];
  const text = kind === "d" ? value.toFixed(0) : kind === "f" ? value.toFixed(+digits)
    : kind === "g" ? value.toPrecision(+digits || 6) : String(value);
  return text.replaceAll("-", "−");
}

function render({ model, el }) {
  el.classList.add("jupyter-widgets", "widget-inline-hbox", "widget-slider", "widget-hslider");
  el.innerHTML = HTML;
  const find = name => el.querySelector(`.${name}`);
  const [label, target, base, connect, origin, handle, readout] =
    ["widget-label", "noUi-target", "noUi-base", "noUi-connect", "noUi-origin", "noUi-handle", "widget-readout"].map(find);
  const log = model.get("base");
  const real = place => log ? log ** place : place;
  const place = () => log ? Math.log(model.get("value")) / Math.log(log) : model.get("value");
  let grasp = null, unsent = false, told = false, grasps = 0;

  const snap = to => {
    const [min, max, step] = ["min", "max", "step"].map(name => model.get(name));
    if (to >= max || to <= min) return to >= max ? max : min;
    return Math.min(max, Number((min + Math.round((to - min) / step) * step).toPrecision(14)));
  };

  function show() {
    const [min, max, disabled] = ["min", "max", "disabled"].map(name => model.get(name));
    const share = max > min ? Math.min(1, Math.max(0, (place() - min) / (max - min))) : 0;
    const words = model.get("description"), width = model.get("style")?.get?.("description_width");
    label.textContent = words; label.title = model.get("tooltip") || words; label.style.display = words ? "" : "none";
    label.style.width = width || "";
    connect.style.transform = `scale(${share}, 1)`;
    origin.style.transform = `translate(${(share - 1) * 1000}%, 0)`;
    const text = spell(model.get("value"), model.get("readout_format"));
    if (document.activeElement !== readout) readout.textContent = text;
    readout.style.display = model.get("readout") ? "" : "none";
    const aria = { label: words, valuemin: real(min), valuemax: real(max), valuenow: model.get("value"), valuetext: text };
    for (const [name, value] of Object.entries(aria)) handle.setAttribute(`aria-${name}`, value);
    readout.setAttribute("aria-label", `${words}, value`);
    for (const part of [target, handle]) part.toggleAttribute("disabled", disabled);
    handle.tabIndex = disabled ? -1 : 0; readout.contentEditable = !disabled;
  }

  function tell(value, now = model.get("continuous_update")) {
    if (value === model.get("value") && !unsent) return;
    model.set("value", value);
    if (model.get("watched")) model.set("held", grasps);
    unsent = !now; told = true;
    if (now) model.save_changes();
  }
  function letGo() {
    if (unsent) tell(model.get("value"), true);
    if (model.get("held")) { model.set("held", 0); model.save_changes(); }
    // A state waits until the one before was answered. A kernel that overlooked that one looks: not before it has drawn.
    if (told) setTimeout(() => model.send({}), 300);
    told = false;
  }

  const at = event => {
    const { left, width } = base.getBoundingClientRect();
    return model.get("min") + (event.clientX - left) / width * (model.get("max") - model.get("min"));
  };
  target.addEventListener("pointerdown", event => {
    if (event.button || model.get("disabled")) return;
    target.setPointerCapture(event.pointerId);
    event.preventDefault(); handle.focus();
    grasp = event.target === handle ? place() - at(event) : 0; grasps = Date.now();
    if (event.target !== handle) tell(real(snap(at(event))));
  });
  for (const moved of ["pointermove", "pointerup"]) target.addEventListener(moved, event => {
    if (grasp !== null && target.hasPointerCapture(event.pointerId)) tell(real(snap(at(event) + grasp)));
  });
  target.addEventListener("lostpointercapture", () => { grasp = null; letGo(); });
  handle.addEventListener("keydown", event => {
    const step = model.get("step"), [min, max] = [model.get("min"), model.get("max")];
    const to = { ArrowLeft: place() - step, ArrowDown: place() - step, ArrowRight: place() + step, ArrowUp: place() + step,
      PageDown: place() - PAGE * step, PageUp: place() + PAGE * step, Home: min, End: max }[event.key];
    if (to === undefined || model.get("disabled") || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); event.stopPropagation();
    grasps = event.repeat ? grasps || Date.now() : 0;  // a key that is only touched holds nothing
    tell(real(snap(to)));
  });
  for (const end of ["keyup", "blur"]) handle.addEventListener(end, letGo);
  const typed = () => {
    const value = Number(readout.textContent.trim().replaceAll("−", "-").replace(",", ".") || NaN);
    const whole = model.get("readout_format") === "d" ? Math.round(value) : value;
    grasps = 0;
    if (Number.isFinite(value)) tell(Math.min(real(model.get("max")), Math.max(real(model.get("min")), whole)), true);
  };
  readout.addEventListener("keydown", event => {
    event.stopPropagation();
    if (event.key === "Enter") { event.preventDefault(); typed(); readout.blur(); }
  });
  readout.addEventListener("blur", () => {
    if (readout.textContent !== spell(model.get("value"), model.get("readout_format"))) typed();
    show();
  });

  model.on("change", show);
  show();
}
export default { render };
