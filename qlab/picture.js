// The picture: it shows what the kernel drew, tells what a hand does in it, and names what others leave without a name.
function address(png) {  // unlike a blob's, it needs no second process to load
  const bytes = new Uint8Array(png.buffer, png.byteOffset, png.byteLength);
  return `data:image/png;base64,${bytes.toBase64?.() ?? base64(bytes)}`;
}

function base64(bytes) {  // for browsers of before 2025; milliseconds slower
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

function render({ model, el }) {
  const [width, height] = model.get("size");
  el.innerHTML = `<div class="qlab-frame"><img class="widget-image" draggable="false"><div class="qlab-tip" hidden></div></div>
    <div class="qlab-below"><div class="widget-html"><div class="widget-html-content"></div></div>
    <button class="jupyter-button widget-button qlab-reset">Reset</button></div>`;
  const [frame, image, tip] = [".qlab-frame", "img", ".qlab-tip"].map(name => el.querySelector(name));
  const numbers = el.querySelector(".widget-html-content");
  frame.style.maxWidth = `${width}px`;
  frame.style.aspectRatio = `${width} / ${height}`;
  image.alt = model.get("alt");

  let png = null, drag = null;
  function show() {
    if (model.get("png") !== png) {
      png = model.get("png");
      image.src = address(png);
    }
    if (numbers.innerHTML_ !== model.get("numbers")) numbers.innerHTML = numbers.innerHTML_ = model.get("numbers");
    const grips = model.get("grips");
    while (frame.querySelectorAll(".qlab-grip").length > grips.length) [...frame.querySelectorAll(".qlab-grip")].at(-1).remove();
    const shown = [...frame.querySelectorAll(".qlab-grip")];
    grips.forEach((grip, i) => {
      if (!shown[i]) {
        shown[i] = document.createElement("div"); shown[i].className = "qlab-grip"; frame.insertBefore(shown[i], tip);
      }
      const [left, top, w, h] = grip.box;
      Object.assign(shown[i].style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * w}%`,
        height: `${100 * h}%`, cursor: grip.cursor, zIndex: 1 + grip.rank });
      shown[i].dataset.name = shown[i].title = grip.name;
    });
    tip.textContent = model.get("tip");
  }

  const at = event => {
    const box = frame.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  function nearest([x, y]) {
    let best = null;
    for (const grip of model.get("grips")) {
      const [left, top, w, h] = grip.box;
      if (x < left || y < top || x > left + w || y > top + h) continue;
      const far = Math.hypot((x - left - w / 2) * width * grip.thin[0], (y - top - h / 2) * height * grip.thin[1]);
      if (!best || grip.rank > best.rank || grip.rank === best.rank && far < best.far) best = { ...grip, far };
    }
    return best;
  }
  const tell = pointer => { model.set("pointer", pointer); model.save_changes(); };
  frame.addEventListener("pointerdown", event => {
    const start = at(event), grip = event.button ? null : nearest(start);
    if (!grip) return model.get("hovers") && tell({ hover: start });
    tip.hidden = true;
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    drag = { drag: Date.now() + Math.random(), grip: grip.id, start, at: start, held: true };
    frame.style.cursor = grip.cursor === "grab" ? "grabbing" : grip.cursor;
    frame.classList.add("qlab-held");
    tell(drag);
  });
  frame.addEventListener("pointermove", event => {
    if (drag) return frame.hasPointerCapture(event.pointerId) && tell(drag = { ...drag, at: at(event) });
    if (model.get("hovers") && !event.buttons) {
      const [x, y] = at(event);
      tip.hidden = false;
      Object.assign(tip.style, { left: `${100 * x}%`, top: `${100 * y}%`, transform:
        `translate(${x > .5 ? "calc(-100% - 12px)" : "14px"}, ${y > .5 ? "calc(-100% - 8px)" : "14px"})` });
      tell({ hover: [x, y] });
    }
  });
  frame.addEventListener("pointerup", event => {  // the last move may have come with it
    if (drag && frame.hasPointerCapture(event.pointerId)) drag = { ...drag, at: at(event) };
  });
  frame.addEventListener("lostpointercapture", () => {
    if (!drag) return;
    model.send({ pointer: { ...drag, held: false } });  // at once: a state waits until the one before was answered
    drag = null; frame.style.cursor = ""; frame.classList.remove("qlab-held");
  });
  frame.addEventListener("pointerleave", () => {
    if (drag || !model.get("hovers")) return;
    tip.hidden = true; tell({ hover: null });
  });
  el.querySelector(".qlab-reset").addEventListener("click", () => model.send({ reset: true }));

  const sharp = () => {
    const ratio = Math.min(2, Math.max(1, devicePixelRatio));
    if (model.get("ratio") !== ratio) { model.set("ratio", ratio); model.save_changes(); }
    screen?.removeEventListener("change", sharp);
    screen = matchMedia(`(resolution: ${devicePixelRatio}dppx)`);
    screen.addEventListener("change", sharp, { once: true });
  };
  let screen = null, names = null, waits = null;

  model.on("change", show);
  show();
  sharp();
  addEventListener("resize", sharp);  // zoom; another screen changes the ratio alone
  const watch = () => {
    const box = el.closest(".qlab");
    if (!box) { waits = setTimeout(watch, 50); return; }
    const name = () => {
      for (const handle of box.querySelectorAll(".noUi-handle:not([aria-label])"))
        handle.ariaLabel = handle.closest(".widget-slider").querySelector(".widget-label").textContent;
      for (const button of box.querySelectorAll(".widget-play button"))
        button.ariaLabel = button.firstElementChild.className.replace("fa fa-", "").replace("retweet", "repeat");
      for (const button of box.querySelectorAll(".widget-toggle-button"))
        button.ariaPressed = button.classList.contains("mod-active");
    };
    names = new MutationObserver(name);
    names.observe(box, { subtree: true, childList: true, attributeFilter: ["class"] });
    name();
  };
  watch();
  return () => {
    clearTimeout(waits); names?.disconnect(); screen?.removeEventListener("change", sharp);
    removeEventListener("resize", sharp);
  };
}
export default { render };
