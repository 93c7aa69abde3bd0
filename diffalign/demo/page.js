// Number keys vote while the voting panel is in view and nobody is typing; the page's checkbox turns them off.
document.addEventListener("keydown", (event) => {
  const keys = { 1: "vote-left", 2: "vote-right", 3: "vote-tie", 4: "vote-bad", n: "vote-next" };
  const id = keys[event.key?.toLowerCase()]; // a browser that fills in a form sends no key
  const typing = event.target.closest("input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]");
  if (!id || typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const allowed = document.querySelector("#vote-keys input");
  const button = document.getElementById(id);
  if (allowed && allowed.checked && button && button.offsetParent !== null && !button.disabled) {
    event.preventDefault();
    button.click();
  }
});

// Gradio's groups of choices have a title to look at; screen readers are told it too. On a phone the numbers begin closed.
let narrow = window.innerWidth <= 860;
new MutationObserver(() => {
  for (const group of document.querySelectorAll("fieldset:not([aria-label])")) {
    const title = group.querySelector("[data-testid=block-info]");
    if (title) group.setAttribute("aria-label", title.textContent.trim());
  }
  const numbers = narrow && document.querySelector("#numbers button");
  if (numbers) {
    narrow = numbers.classList.contains("open"); // until Gradio listens, a click does nothing
    if (narrow) numbers.click();
  }
}).observe(document, { childList: true, subtree: true });
