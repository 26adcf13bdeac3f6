// The page's own script: clips that play in step, the address that remembers, clips that are dropped onto the page.
(() => {
  // --- the address: what differs from how the page starts, the tab, and the jobs that its tabs show -------------------
  // Nothing is written before the server has read the address: Gradio tells that the first tab is shown as soon as it is there.
  let read = false;
  const write = (change) => {
    if (!read) return;
    const url = new URL(window.location.href);
    change(url.searchParams);
    if (url.href !== window.location.href) window.history.replaceState(window.history.state, '', url);
  };
  const put = (search, name, value, start, most) => {
    const text = value === null || value === undefined ? '' : String(value);
    const same = text === (start === null || start === undefined ? '' : String(start));
    if (same || text.length > most) search.delete(name); else search.set(name, text);
  };
  window.tilewise = {
    addressIsRead() {
      read = true;
      const name = new URL(window.location.href).searchParams.get('tab');
      if (name) document.querySelector(`#tabs [role=tab][data-tab-id="${CSS.escape(name)}"]`)?.click();
    },
    remember(name, value) { write((search) => put(search, name, value, '', 200)); },
    tab(name) { write((search) => put(search, 'tab', name, 'generate', 200)); },
    rememberAll(values) {
      const told = window.tilewiseFields;
      write((search) => told.names.forEach((name, n) => put(search, name, values[n], told.start[name], told.most)));
    },
  };

  // --- players of a pair start, stop and seek together, and the others follow the first: decoders drift apart ---------
  const pairOf = (node) => node.closest && node.closest('.tw-pair');
  const others = (video) => [...pairOf(video).querySelectorAll('video')].filter((v) => v !== video);
  const follow = (kind, act) => document.addEventListener(kind, (event) => {
    const video = event.target;
    if (video.tagName === 'VIDEO' && pairOf(video)) for (const other of others(video)) act(video, other);
  }, true);
  const start = (video) => video.play().catch(() => {});  // it may be paused or taken away before it plays: no error
  const align = (from, to) => { if (Math.abs(from.currentTime - to.currentTime) > 0.05) to.currentTime = from.currentTime; };
  follow('play', (from, to) => { if (to.paused) { align(from, to); start(to); } });
  follow('pause', (from, to) => { if (!to.paused) to.pause(); align(from, to); });
  follow('seeked', (from, to) => { if (from.paused) align(from, to); });
  follow('timeupdate', (from, to) => {
    if (from === pairOf(from).querySelector('video') && Math.abs(from.currentTime - to.currentTime) > 0.12) align(from, to);
  });
  document.addEventListener('click', (event) => {
    const button = event.target.closest && event.target.closest('.tw-play');
    if (!button) return;
    const first = pairOf(button).querySelector('video');
    if (first.paused) start(first); else first.pause();
  });

  // --- a clip that is dropped anywhere goes to the button that loads settings, unless it fell on another field for files
  const isFile = (event) => event.dataTransfer && [...event.dataTransfer.types].includes('Files');
  const ownField = (event) => event.target.closest && event.target.closest('#batch-file');
  const shade = (on) => document.body.classList.toggle('tw-dropping', on);
  document.addEventListener('dragover', (event) => {
    if (!isFile(event) || ownField(event)) { shade(false); return; }
    event.preventDefault();
    shade(true);
  });
  document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) shade(false); });
  document.addEventListener('drop', (event) => {
    shade(false);
    if (!isFile(event) || ownField(event)) return;
    event.preventDefault();
    const field = document.querySelector('input[type=file]:has(~ #load-settings)');  // Gradio puts it beside its button
    if (!field || !event.dataTransfer.files.length) return;
    const one = new DataTransfer();
    one.items.add(event.dataTransfer.files[0]);
    field.files = one.files;
    field.dispatchEvent(new Event('change', {bubbles: true}));
  });
})();
