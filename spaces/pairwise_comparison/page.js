// The page marks results that are out of date, keeps the address and the link of the comparison shown, says what it is
// doing, and moves to its results.
window.page = (() => {
  const OURS = ["model", "kind", "prompt", "a", "b", "t"], SAID = {
    compare: ["Comparing…", "Still comparing: your first press counts."],
    ranking: ["Ranking…", "Still ranking: your first press counts."],
    report: ["Scoring…", "Still scoring: your first press counts."],
  };
  const PLACE = { compare: "verdict", ranking: "ranking", report: "report" };
  const busy = {};

  const say = (which, text) => {
    const place = document.querySelector(`#${which}-status [role=status]`);
    if (place) place.textContent = text;
  };

  // Parameters of the address that are not ours (a theme) stay in it.
  const address = (query) => {
    const rest = new URLSearchParams(window.location.search);
    for (const name of OURS) rest.delete(name);
    const all = [query.slice(1), rest.toString()].filter(Boolean).join("&");
    window.history.replaceState(null, "", window.location.pathname + (all && "?" + all));
  };

  const absolute = (query) => query.startsWith("?") ? window.location.origin + window.location.pathname + query : query;

  // The query of a link to a comparison, if the page was opened by one; and the link to the comparison shown.
  const opened = (link) => {
    for (const id of Object.values(PLACE)) {
      const place = document.getElementById(id);
      if (place) place.setAttribute("aria-live", "polite");
    }
    // The button of an upload is named after what stands on it.
    const name = () => document.querySelectorAll("button.upload-container[aria-label]")
      .forEach((button) => button.removeAttribute("aria-label"));
    new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
    name();
    const fields = new URLSearchParams(window.location.search);
    return [OURS.some((name) => fields.has(name)) ? window.location.search : "", absolute(link || "")];
  };

  const start = (which) => {
    say(which, SAID[which][busy[which] ? 1 : 0]);
    busy[which] = true;
  };

  const arrived = (which) => {
    busy[which] = false;
    say(which, "");
    window.setTimeout(() => {
      const found = document.querySelector(`#${PLACE[which]} h2, #${PLACE[which]} .problem`);
      if (!found) return;
      found.setAttribute("tabindex", "-1");
      found.focus({ preventScroll: true });
      const box = found.getBoundingClientRect();
      if (box.top < 0 || box.bottom > window.innerHeight * 0.8) found.scrollIntoView({ block: "start" });
    }, 100);
  };

  // Whether the inputs are still those that were compared; returns the link, which there is only if they are.
  const mark = (...values) => {
    const compared = values.pop(), root = document.querySelector("#verdict .rm");
    if (!compared) {
      address("");
      return "";
    }
    const old = compared.inputs.some((value, i) => (value ?? "") !== (values[i] ?? ""));
    const note = root && root.querySelector(".stale");
    if (note) {
      root.classList.toggle("old", old);
      note.hidden = !old;
      const next = busy.compare ? "The new ones are being compared." : "Press Compare.";
      note.textContent = old ? `Out of date: the inputs have changed since. ${next}` : "";
    }
    const linked = compared.link.startsWith("?");
    if (old || !linked) address("");
    else if (compared.pressed) address(compared.link);
    return old ? "" : absolute(compared.link);
  };

  return { start, arrived, opened, mark };
})();
