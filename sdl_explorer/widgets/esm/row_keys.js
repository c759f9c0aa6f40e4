const MOVES = { ArrowUp: "up", ArrowDown: "down", PageUp: "pageup", PageDown: "pagedown", Home: "home", End: "end" }
export function render({ model, el }) {
  const frame = document.createElement("div")
  frame.className = "frame"
  frame.tabIndex = 0
  const name = () => { frame.setAttribute("role", "group"); frame.setAttribute("aria-label", model.label) }
  frame.addEventListener("keydown", (event) => {
    const field = event.composedPath()[0]
    if (field instanceof HTMLInputElement || field instanceof HTMLSelectElement) { return }
    const move = MOVES[event.key]
    if (move === undefined || event.ctrlKey || event.metaKey || event.altKey) { return }
    event.preventDefault()
    event.stopPropagation()
    model.send_msg({ move })
  })
  model.on("label", name)
  name()
  frame.append(model.get_child("table"))
  el.append(frame)
}
