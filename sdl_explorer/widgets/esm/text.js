// A plot that React has not rendered yet has no layout, and measuring it then throws (Bokeh 3.9.2 inside Panel 1.9.4's
// ReactiveESM): such a plot is measured again when it is rendered.
const PlotView = window.Bokeh?.Models?.get("Plot")?.prototype?.default_view
if (PlotView && !PlotView.prototype.sdlx_patient) {
  for (const name of ["_measure_layout", "_after_layout"]) {
    const own = PlotView.prototype[name]
    PlotView.prototype[name] = function () { if (this.layout != null) { own.call(this) } }
  }
  PlotView.prototype.sdlx_patient = true
}

export function render({ model, el }) {
  const node = document.createElement(model.tag)
  let drawn = null
  const button = (words) => {
    const one = document.createElement("button")
    one.type = "button"
    one.textContent = words.replace(/^\[|\]$/g, "")
    one.addEventListener("click", () => model.send_msg({ act: one.textContent }))
    return one
  }
  // What an action matches is a button; the rest is text, never markup.
  const parts = () => {
    if (!model.actions.length) { return [model.text] }
    const action = new RegExp(`(${model.actions.join("|")})`)
    return model.text.split(action).map((part, i) => i % 2 ? button(part) : part)
  }
  const draw = () => {
    node.className = `sdlx-line ${model.tone}`
    if (model.role) { node.setAttribute("role", model.role) } else { node.removeAttribute("role") }
    if (drawn !== model.text) { drawn = model.text; node.replaceChildren(...parts()) }
  }
  const come = () => {
    if (!model.called) { return }
    node.tabIndex = -1
    node.focus({ preventScroll: true })
    node.scrollIntoView({ block: "nearest" })
    model.called = false
  }
  for (const name of ["text", "tone", "role"]) { model.on(name, draw) }
  model.on("called", come)
  draw()
  el.append(node)
  requestAnimationFrame(come)
}
