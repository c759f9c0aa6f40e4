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
  const draw = () => {
    node.className = `sdlx-line ${model.tone}`
    if (model.role) { node.setAttribute("role", model.role) } else { node.removeAttribute("role") }
    if (node.textContent !== model.text) { node.textContent = model.text }
  }
  for (const name of ["text", "tone", "role"]) { model.on(name, draw) }
  draw()
  el.append(node)
}
