// Small pictures are shown in large, and with sharp edges.
document.addEventListener("load", (event) => {
  const picture = event.target;
  if (picture instanceof HTMLImageElement && picture.naturalWidth) {
    const small = Math.max(picture.naturalWidth, picture.naturalHeight) <= 128;
    picture.classList.toggle("pixels", small);
  }
}, true);

// What Gradio leaves out for those who use no mouse or see no pictures.
let seen = false; // whether an edit is being made
new MutationObserver(() => {
  for (const picture of document.querySelectorAll("#shipped button img")) {
    const name = decodeURIComponent(picture.src.split("/").pop()).replace(/\.png$/, "");
    picture.alt = name.replaceAll("-", " ");
  }
  const names = ["before", "after"];
  document.querySelectorAll("#slider .content img").forEach((picture, place) => {
    picture.alt = names[place] ?? "";
  });
  const working = document.querySelector("#stage .working");
  if (working && !seen) {
    const { top } = working.getBoundingClientRect();
    if (top > window.innerHeight * 0.7) working.scrollIntoView({ block: "center" });
  }
  seen = Boolean(working);
  const handle = document.querySelector("#slider .outer");
  if (handle && handle.tabIndex !== 0) {
    handle.tabIndex = 0;
    handle.setAttribute("role", "slider");
    handle.setAttribute("aria-label", "Before and after: move with the arrow keys");
    handle.setAttribute("aria-valuemin", "0");
    handle.setAttribute("aria-valuemax", "100");
    handle.setAttribute("aria-valuenow", "50");
    handle.addEventListener("keydown", moved);
  }
}).observe(document.documentElement, { childList: true, subtree: true });

// The arrow keys drag the handle of the slider as a mouse would.
function moved(event) {
  const step = { ArrowLeft: -0.05, ArrowRight: 0.05, Home: -1, End: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const handle = event.currentTarget;
  const frame = handle.parentElement.getBoundingClientRect();
  const grip = (handle.querySelector(".inner") ?? handle).getBoundingClientRect();
  const from = grip.left + grip.width / 2;
  const to = Math.min(Math.max(from + step * frame.width, frame.left + 1), frame.right - 1);
  const at = (kind, x) => new MouseEvent(kind, {
    bubbles: true, cancelable: true, view: window, button: 0, clientX: x, clientY: grip.top + 20,
  });
  handle.dispatchEvent(at("mousedown", from));
  window.dispatchEvent(at("mousemove", to));
  window.dispatchEvent(at("mouseup", to));
  const share = Math.round(100 * (to - frame.left) / frame.width);
  handle.setAttribute("aria-valuenow", String(share));
}
