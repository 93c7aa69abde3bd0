// Number keys vote while the voting panel is in view and nobody is typing; the page's checkbox turns them off.
document.addEventListener("keydown", (event) => {
  const keys = { 1: "vote-left", 2: "vote-right", 3: "vote-tie", 4: "vote-bad", n: "vote-next" };
  const id = keys[event.key.toLowerCase()];
  const typing = event.target.closest("input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]");
  if (!id || typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const allowed = document.querySelector("#vote-keys input");
  const button = document.getElementById(id);
  if (allowed && allowed.checked && button && button.offsetParent !== null && !button.disabled) {
    event.preventDefault();
    button.click();
  }
});
