// Keys are heard on the app's root element: JupyterLab's command mode owns the document. A served page is alone in its
// document, and with nothing focused its keys go to the body, so there the body is the root.
const FIELDS = new Set(["INPUT", "TEXTAREA", "SELECT", "OPTION"])
const ROLES = new Set(["slider", "spinbutton", "textbox", "combobox", "listbox", "option", "menu", "menuitem", "grid", "dialog"])
const NAMED = { " ": "Space", ".": "step", "?": "help", ArrowLeft: "previous", ArrowRight: "next", Escape: "escape" }

function root_of(el) {
  let node = el
  while (node.getRootNode() instanceof ShadowRoot) { node = node.getRootNode().host }
  while (node.parentElement && node.parentElement !== document.body && !node.classList.contains("jp-OutputArea-output")) {
    node = node.parentElement
  }
  return node.parentElement === document.body ? document.body : node
}

// The search field may lie in any shadow root.
function focus_search(node) {
  for (const child of node.querySelectorAll("*")) {
    const field = child.matches(".sdlx-search") ? (child.shadowRoot || child).querySelector("input") : null
    if (field) { field.focus(); field.select(); return true }
    if (child.shadowRoot && focus_search(child.shadowRoot)) { return true }
  }
  return false
}

// JupyterLab's theme where there is one, else the operating system's.
function prefers_dark() {
  const lab = document.body.dataset.jpThemeLight
  return lab === undefined ? window.matchMedia("(prefers-color-scheme: dark)").matches : lab === "false"
}

function busy(event) {
  for (const node of event.composedPath()) {
    if (!(node instanceof Element)) { continue }
    if (FIELDS.has(node.tagName) || node.isContentEditable || ROLES.has(node.getAttribute("role"))) { return true }
    if (node.getAttribute("role") === "tab" && event.key.startsWith("Arrow")) { return true }
    if (node.tagName === "BUTTON" && (event.key === " " || event.key === "Enter")) { return true }
    if (node.classList.contains("frame") && node.tabIndex === 0) { return true }
  }
  return false
}

export function render({ model, el }) {
  const root = root_of(el)
  if (root !== document.body && root.tabIndex < 0) { root.tabIndex = 0 }
  const hear = (event) => {
    if (!model.active || event.defaultPrevented || event.altKey) { return }
    if (event.ctrlKey || event.metaKey) {
      if (event.key.toLowerCase() !== "z" || busy(event)) { return }
      event.preventDefault()
      model.send_msg({ key: event.shiftKey ? "redo" : "undo" })
      return
    }
    if (busy(event) && event.key !== "Escape") { return }
    if (event.key === "/") {
      if (focus_search(root)) { event.preventDefault() }
      return
    }
    let key = NAMED[event.key]
    if (event.code === "Period" && event.shiftKey) { key = "run" }
    if (/^[1-7]$/.test(event.key)) { key = `page ${event.key}` }
    if (/^[art]$/i.test(event.key)) { key = event.key.toUpperCase() }
    if (key === undefined) { return }
    event.preventDefault()
    model.send_msg({ key })
  }
  root.addEventListener("keydown", hear)
  if (model.follow && prefers_dark()) { model.send_msg({ key: "dark" }) }
  model.on("remove", () => root.removeEventListener("keydown", hear))
}
