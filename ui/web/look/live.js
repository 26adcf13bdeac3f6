// The live tab: plays a fragmented mp4 while it is made, by MediaSource, and shows and changes the state of its stream.
(() => {
  const KEEP = 10;  // seconds that stay behind the place that is shown; older ones are taken out of the buffer
  const PACE = 400;  // milliseconds between two questions for the state
  let at = null;  // the stream that is shown: {name, stop, media, buffer, waiting, header, ended}
  let state = {};

  // One element for all of the page's life: Gradio takes the contents of a tab away when another one is opened.
  const node = document.createElement('div');
  node.innerHTML = `<video class="tw-clip" id="live-video" muted playsinline aria-label="the stream"></video>
    <div class="tw-buttons tw-row">
      <button type="button" class="tw-button" data-live="prompt">Change the prompt</button>
      <button type="button" class="tw-button" data-live="pause">Pause</button>
      <button type="button" class="tw-button" data-live="save">Save</button></div>
    <div class="tw-timeline" role="img"><i></i><b></b></div>
    <div class="tw-quiet" id="live-words" role="status"></div>
    <table class="tw-table" id="live-numbers"></table><div id="live-picture" class="tw-wide"></div>`;
  node.hidden = true;
  const find = (selector) => node.querySelector(selector);
  const video = find('video'), words = find('#live-words');
  video.muted = true;
  const play = () => video.play().catch(() => {});  // it may be taken away before it plays: no error
  const mount = () => {
    const place = document.querySelector('#live-player');
    if (place && node.parentNode !== place) { place.append(node); if (at && !state.paused) play(); }
  };
  new MutationObserver(mount).observe(document.documentElement, {childList: true, subtree: true});

  // --- the buffer ----------------------------------------------------------------------------------------------------
  // The codec is in the box avcC of the header: profile, compatibility and level (RFC 6381).
  const codecOf = (bytes) => {
    for (let i = 0; i + 8 < bytes.length; i++) {
      if (bytes[i] === 0x61 && bytes[i + 1] === 0x76 && bytes[i + 2] === 0x63 && bytes[i + 3] === 0x43) {
        const hex = [...bytes.subarray(i + 5, i + 8)].map((byte) => byte.toString(16).padStart(2, '0'));
        return `video/mp4; codecs="avc1.${hex.join('')}"`;
      }
    }
    return null;
  };
  const joined = (one, other) => { const all = new Uint8Array(one.length + other.length); all.set(one); all.set(other, one.length); return all; };
  const pump = (it) => {
    if (it !== at || !it.buffer || it.buffer.updating || it.media.readyState !== 'open') return;
    const ranges = it.buffer.buffered;
    if (ranges.length && video.currentTime < ranges.start(0)) video.currentTime = ranges.start(0);  // it began before this page came
    if (ranges.length && video.currentTime - ranges.start(0) > 1.5 * KEEP) {
      it.buffer.remove(0, video.currentTime - KEEP);
    } else if (it.waiting.length) {
      it.buffer.appendBuffer(it.waiting.shift());
    } else if (it.ended) {
      it.media.endOfStream();
    }
  };
  const arrived = (it, bytes) => {
    if (it.buffer) { it.waiting.push(bytes); pump(it); return; }
    it.header = joined(it.header, bytes);
    const codec = codecOf(it.header);
    if (!codec) return;
    it.buffer = it.media.addSourceBuffer(codec);
    it.buffer.addEventListener('updateend', () => pump(it));
    it.waiting.push(it.header);
    pump(it);
    play();
  };
  const follow = async (it) => {
    try {
      await new Promise((opened) => it.media.addEventListener('sourceopen', opened, {once: true}));
      const answer = await fetch(`live/${it.name}.mp4`, {signal: it.stop.signal});
      if (!answer.ok) { await answer.text(); return; }  // the status of the job says why
      const reader = answer.body.getReader();
      for (;;) {
        const {done, value} = await reader.read();
        if (done) break;
        if (it !== at) return;
        arrived(it, value);
      }
    } catch (error) {
      if (it === at && error.name !== 'AbortError') words.textContent = 'the connection to the server was lost';
    } finally {
      it.ended = true;
      pump(it);
      ask(it);
    }
  };

  // --- the state -----------------------------------------------------------------------------------------------------
  const bytes = (count) => count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(1)} GiB` : `${(count / 2 ** 20).toFixed(0)} MiB`;
  const row = (name, value) => {
    const line = document.createElement('tr');
    line.append(Object.assign(document.createElement('th'), {scope: 'row', textContent: name}));
    line.append(Object.assign(document.createElement('td'), {textContent: value}));
    return line;
  };
  const draw = () => {
    const seconds = state.seconds || 0, whole = Math.max(seconds, 10), share = (time) => `${100 * Math.min(1, time / whole)}%`;
    const line = find('.tw-timeline');
    line.querySelector('i').style.width = share(seconds);
    line.querySelector('b').style.left = share(video.currentTime);
    for (const old of line.querySelectorAll('u')) old.remove();
    const changes = (state.prompts || []).slice(1);
    for (const [time, prompt] of changes) {
      const mark = Object.assign(document.createElement('u'), {title: `${time.toFixed(2)} s: ${prompt}`});
      mark.style.left = share(time);
      line.append(mark);
    }
    line.setAttribute('aria-label', `time-line: ${seconds.toFixed(1)} s made, ${changes.length} changes of the prompt`);
    const rows = [];
    if (state.frames) {
      const ahead = Math.max(0, seconds - video.currentTime);
      rows.push(row('frames a second', `${state.rate.toFixed(1)} made, ${state.fps} played`));
      rows.push(row('made', `${state.frames} frames, ${seconds.toFixed(1)} s of ${state.total.toFixed(0)} s`));
      rows.push(row('ahead of what you see', `${ahead.toFixed(1)} s`));
      if (state.memory.bytes) rows.push(row('memory', `${bytes(state.memory.bytes)} (${state.memory.of})`));
      const kept = state.source.kind === 'cache' && state.source.frames.filter(([number]) => number >= 0).length;
      if (kept !== false) rows.push(row('latents in the cache', `${kept} of ${state.source.window}, ${bytes(state.cache_bytes)}`));
      rows.push(row('prompt', state.prompts.at(-1)[1]));
    }
    find('#live-numbers').replaceChildren(...rows);
    const picture = find('#live-picture');
    if (picture.drawn !== state.picture) { picture.innerHTML = state.picture || ''; picture.drawn = state.picture; }
    const live = at && !state.ended && !at.ended;
    find('[data-live=prompt]').disabled = find('[data-live=pause]').disabled = !live;
    find('[data-live=save]').disabled = !state.frames || live || Boolean(state.result && state.result.saved);
    find('[data-live=pause]').textContent = state.paused ? 'Go on' : 'Pause';
    if (state.next_prompt) words.textContent = `comes next: ${state.next_prompt}`;
    else if (state.result && state.result.saved) words.textContent = `saved as ${state.result.saved}; History shows it`;
    else if (words.textContent.startsWith('comes next')) words.textContent = '';
  };
  const ask = async (it) => {
    try {
      const seen = it.buffer ? `?at=${video.currentTime.toFixed(3)}` : '';
      const answer = await fetch(`live/${it.name}${seen}`, {cache: 'no-store'});
      if (it === at && answer.ok) { state = await answer.json(); draw(); }
    } catch { /* the stream's own connection says what is wrong */ }
  };
  const tell = async (action, body) => {
    const it = at;
    try {
      const answer = await fetch(`live/${it.name}/${action}`, {method: 'POST', body});
      words.textContent = answer.ok ? '' : await answer.text();
    } catch { words.textContent = 'the server does not answer'; }
    await ask(it);
  };
  setInterval(() => { if (at && !at.ended) ask(at); }, PACE);
  node.addEventListener('click', (event) => {
    const action = event.target.dataset && event.target.dataset.live;
    if (!action || !at) return;
    if (action === 'prompt') tell('prompt', document.querySelector('#prompt textarea').value);
    else if (action === 'save') tell('save');
    else if (state.paused) { tell('resume'); play(); }
    else { tell('pause'); video.pause(); }
  });

  window.tilewise.live = {
    // Plays the stream of a job; '' for none.
    show(name) {
      if (at && at.name === name) return;
      if (at) at.stop.abort();
      state = {};
      words.textContent = '';
      node.hidden = !name;
      if (!name) { at = null; video.removeAttribute('src'); return; }
      const media = new MediaSource();
      at = {name, stop: new AbortController(), media, buffer: null, waiting: [], header: new Uint8Array(), ended: false};
      video.src = URL.createObjectURL(media);
      mount();
      follow(at);
    },
  };
})();
