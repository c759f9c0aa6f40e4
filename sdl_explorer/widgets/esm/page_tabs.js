// ARIA tabs: one tab stop, arrows move between them, the chosen one is in the tab order.
export function render({ model, el }) {
  const list = document.createElement("div")
  list.className = "tabs"
  list.setAttribute("role", "tablist")
  list.setAttribute("aria-label", "Pages")
  const tabs = () => [...list.children]
  const choose = (name, focus) => {
    model.value = name
    draw()
    if (focus) { tabs().find((tab) => tab.dataset.name === name)?.focus() }
  }
  const draw = () => {
    if (tabs().length !== model.options.length) {
      list.replaceChildren(...model.options.map((name) => {
        const tab = document.createElement("button")
        tab.type = "button"
        tab.textContent = name
        tab.dataset.name = name
        tab.setAttribute("role", "tab")
        tab.addEventListener("click", () => choose(name, false))
        return tab
      }))
    }
    for (const tab of tabs()) {
      const chosen = tab.dataset.name === model.value
      tab.setAttribute("aria-selected", String(chosen))
      tab.tabIndex = chosen ? 0 : -1
    }
  }
  list.addEventListener("keydown", (event) => {
    const at = model.options.indexOf(model.value), n = model.options.length
    const to = { ArrowRight: (at + 1) % n, ArrowLeft: (at + n - 1) % n, Home: 0, End: n - 1 }[event.key]
    if (to === undefined) { return }
    event.preventDefault()
    event.stopPropagation()
    choose(model.options[to], true)
  })
  model.on("value", draw)
  model.on("options", draw)
  draw()
  el.append(list)
}
