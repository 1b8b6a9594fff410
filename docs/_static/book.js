// Pictures open in full size: a click or the Enter key; Escape or a click closes them.
for (const picture of document.querySelectorAll(".cell_output img")) {
  if (picture.closest(".frames")) continue;
  picture.tabIndex = 0;
  picture.setAttribute("role", "button");
  picture.title = "show in full size";
  const open = () => {
    const dialog = document.createElement("dialog");
    dialog.className = "enlarged";
    dialog.setAttribute("aria-label", picture.alt);
    const large = document.createElement("img");
    [large.src, large.alt] = [picture.src, picture.alt];
    dialog.append(large);
    dialog.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => { dialog.remove(); picture.focus(); });
    document.body.append(dialog);
    dialog.showModal();
  };
  picture.addEventListener("click", open);
  picture.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
}
