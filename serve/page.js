// Small pictures are shown in large, and with sharp edges.
document.addEventListener("load", (event) => {
  const picture = event.target;
  if (picture instanceof HTMLImageElement && picture.naturalWidth) {
    const small = Math.max(picture.naturalWidth, picture.naturalHeight) <= 128;
    picture.classList.toggle("pixels", small);
  }
}, true);
