// A heading whose button opens and closes what stands under it.
export function render({ model, el }) {
  const heading = document.createElement("h3")
  const button = document.createElement("button")
  button.type = "button"
  button.addEventListener("click", () => { model.open = !model.open; draw() })
  const draw = () => {
    button.setAttribute("aria-expanded", String(model.open))
    button.textContent = `${model.open ? "▾" : "▸"} ${model.label}`
  }
  model.on("open", draw)
  model.on("label", draw)
  draw()
  heading.append(button)
  el.append(heading)
}
