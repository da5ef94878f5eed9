// A member of a call without a focus, written from docs/mesh.md with nothing but RTCPeerConnection. It has one peer.
// The test carries the messages to and from the homeserver, Olm-encrypted.
const outbox = [];
const errors = [];
const data = [];
const early = new Map(); // by call, the messages by number whose turn has not come
let we, they, place, pc, call, caller, channels, offering, offerAgain, ended, work = Promise.resolve();
let seq = { ours: 0, theirs: 0 };
let ours = []; // {track, stream, source, muted}
let theirStreams = {};
let pending = []; // candidates that no message has carried yet
let timer;

// One thing after the other, as messages and clicks come while descriptions are being made.
function queue(step) {
  const done = work.then(step);
  work = done.catch((error) => errors.push(String(error?.stack ?? error)));
  return done;
}

async function start(args) {
  ({ us: we, them: they, place } = args);
  const order = ["user_id", "device_id", "session_id"].find((name) => we[name] !== they[name]);
  caller = we[order] > they[order];
  await publish(args.sources);
  if (caller)
    await queue(async () => {
      call = crypto.randomUUID();
      connect();
      channels = {
        reliable: pc.createDataChannel("_reliable"),
        lossy: pc.createDataChannel("_lossy", { ordered: false, maxRetransmits: 0 }),
      };
      Object.values(channels).forEach(listen);
      for (const kind of args.bidirectional ? [] : ["audio", "video"]) pc.addTransceiver(kind, { direction: "recvonly" });
      const direction = args.bidirectional ? "sendrecv" : "sendonly";
      for (const { track, stream } of ours) pc.addTransceiver(track, { direction, streams: [stream] });
      const offer = await describe(await pc.createOffer());
      send("m.call.invite", {
        ...{ offer, invitee: they.user_id, lifetime: 60000, "dev.antiphon.call_number": 0 },
        ...{ capabilities: {}, sdp_stream_metadata: metadata() },
      });
    });
}

function connect() {
  pc = new RTCPeerConnection({});
  pc.onicecandidate = ({ candidate }) => {
    // Firefox tells the end twice.
    if (candidate?.candidate === "") return;
    pending.push(candidate ? candidate.toJSON() : { candidate: "", sdpMid: "0", sdpMLineIndex: 0 });
    timer ??= setTimeout(tellCandidates, 500);
  };
  pc.ontrack = ({ track }) => {
    const element = document.createElement(track.kind);
    Object.assign(element, { autoplay: true, srcObject: new MediaStream([track]) });
    document.body.append(element);
  };
  pc.ondatachannel = ({ channel }) => {
    channels ??= {};
    channels[channel.label.slice(1)] = channel;
    listen(channel);
  };
}

function listen(channel) {
  channel.binaryType = "arraybuffer";
  channel.onmessage = (event) => data.push(new TextDecoder().decode(event.data));
}

function tellCandidates() {
  timer = undefined;
  // Those that come before the description are in it.
  if (pending.length && seq.ours > 0) send("m.call.candidates", { candidates: pending.splice(0) });
}

// Sets a description of ours, and returns it with the candidates of the first 200 ms.
async function describe(description) {
  await pc.setLocalDescription(description);
  const until = performance.now() + 200;
  while (pc.iceGatheringState !== "complete" && performance.now() < until) await new Promise((go) => setTimeout(go, 10));
  clearTimeout(timer);
  timer = undefined;
  pending = pending.filter(({ candidate }) => !candidate);
  if (pending.length) timer = setTimeout(tellCandidates, 0);
  return { type: pc.localDescription.type, sdp: pc.localDescription.sdp };
}

function send(type, content) {
  const fields = { version: "1", room_id: place.room, conf_id: place.slot, call_id: call, seq: seq.ours++ };
  const parties = { sender_session_id: we.session_id, dest_session_id: they.session_id };
  outbox.push({ type, content: { ...content, ...fields, ...parties, party_id: we.device_id, device_id: we.device_id } });
}

function metadata() {
  const entry = ({ track, stream, source, muted }) => {
    const { width = 0, height = 0 } = track.kind === "video" ? track.getSettings() : {};
    const flags = { audio_muted: muted || track.kind !== "audio", video_muted: muted || track.kind !== "video" };
    return [stream.id, { purpose: "m.usermedia", ...flags, "dev.antiphon.track": { source, name: "", width, height } }];
  };
  return Object.fromEntries(ours.map(entry));
}

function take(message) {
  const { call_id, seq: number, dest_session_id } = message.content;
  if (dest_session_id !== we.session_id) return;
  if (call_id === call && number < seq.theirs) return;
  if (call_id === call && message.type === "m.call.hangup") return void queue(() => handle(message));
  // Messages may overtake each other, and the invite of their call.
  const waiting = early.get(call_id) ?? new Map();
  early.set(call_id, waiting.set(number, message));
  if (message.type === "m.call.invite" && !caller && call_id !== call) {
    pc?.close();
    [pc, call, seq] = [undefined, call_id, { ours: 0, theirs: 0 }];
  }
  if (call_id !== call) return;
  for (let next; (next = waiting.get(seq.theirs)); ) {
    waiting.delete(seq.theirs++);
    queue(() => handle(next));
  }
}

async function handle({ type, content }) {
  if (content.sdp_stream_metadata) theirStreams = content.sdp_stream_metadata;
  if (type === "m.call.invite") {
    connect();
    const answer = await answerTo(content.offer);
    send("m.call.answer", { answer, capabilities: {}, sdp_stream_metadata: metadata() });
    askForSections();
  } else if (type === "m.call.answer") {
    await pc.setRemoteDescription(content.answer);
  } else if (type === "m.call.negotiate" && content.description.type === "offer") {
    const description = await answerTo(content.description);
    send("m.call.negotiate", { description, sdp_stream_metadata: metadata() });
  } else if (type === "m.call.negotiate") {
    await pc.setRemoteDescription(content.description);
    offering = false;
    if (offerAgain) await offer();
  } else if (type === "m.call.candidates") {
    for (const candidate of content.candidates) await pc.addIceCandidate(candidate);
  } else if (type === "m.call.sdp_stream_metadata_changed" && caller) {
    await offer();
  } else if (type === "m.call.hangup") {
    ended = content.reason;
    pc.close();
  }
}

// In which sections of an offer we may send. The DOM doesn't tell: a transceiver that the offer made is `recvonly`
// either way.
function maySend(sdp) {
  const value = (section, name) => section.match(new RegExp(`^a=${name}(.*)\r$`, "m"))?.[1];
  const sections = sdp.split(/^(?=m=)/m).slice(1);
  return new Set(
    sections.filter((s) => !/^a=(sendonly|inactive)\r$/m.test(s)).map((s) => value(s, "mid:")),
  );
}

async function answerTo(offer) {
  await pc.setRemoteDescription(offer);
  const usable = maySend(offer.sdp);
  const kind = (transceiver) => transceiver.receiver.track.kind;
  for (const { track, stream } of ours) {
    if (pc.getSenders().some((sender) => sender.track === track)) continue;
    const free = pc.getTransceivers().find((of) => usable.has(of.mid) && kind(of) === track.kind && !of.sender.track);
    if (!free) continue;
    free.direction = free.direction === "recvonly" ? "sendrecv" : "sendonly";
    free.sender.setStreams(stream);
    await free.sender.replaceTrack(track);
  }
  return describe(await pc.createAnswer());
}

// A callee can't offer: it describes what it has, and the caller makes sections.
function askForSections() {
  const sent = new Set(pc.getSenders().map((sender) => sender.track));
  if (ours.some(({ track }) => !sent.has(track)))
    send("m.call.sdp_stream_metadata_changed", { sdp_stream_metadata: metadata() });
}

// A later offer of the caller: sections for its new tracks, and for all that the callee has described.
async function offer() {
  offerAgain = offering;
  if (offering) return;
  offering = true;
  const described = Object.values(theirStreams).map((stream) => stream["dev.antiphon.track"].source);
  for (const kind of ["audio", "video"]) {
    const wanted = described.filter((source) => (source === "microphone") === (kind === "audio")).length;
    const receiving = pc.getTransceivers().filter((of) => of.receiver.track.kind === kind && of.direction.includes("recv"));
    for (let have = receiving.length; have < wanted; have++) pc.addTransceiver(kind, { direction: "recvonly" });
  }
  const sent = new Set(pc.getSenders().map((sender) => sender.track));
  for (const { track, stream } of ours.filter(({ track }) => !sent.has(track)))
    pc.addTransceiver(track, { direction: "sendonly", streams: [stream] });
  const description = await describe(await pc.createOffer());
  send("m.call.negotiate", { description, sdp_stream_metadata: metadata() });
}

const constraints = { microphone: { audio: true }, camera: { video: { width: 320, height: 240, frameRate: 15 } } };

// Captures devices; once the call is up, they are sent from the next round on.
async function publish(sources) {
  for (const source of sources) {
    const [track] = (await navigator.mediaDevices.getUserMedia(constraints[source])).getTracks();
    ours.push({ track, stream: new MediaStream([track]), source, muted: false });
  }
}

async function publishLater({ sources }) {
  await publish(sources);
  await queue(() => (caller ? offer() : askForSections()));
}

function setMuted({ source, muted }) {
  for (const of of ours.filter((of) => of.source === source)) {
    of.muted = muted;
    of.track.enabled = !muted;
  }
  send("m.call.sdp_stream_metadata_changed", { sdp_stream_metadata: metadata() });
}

// LiveKit's `DataPacket { user: UserPacket { payload, topic } }`, all of it shorter than 128 bytes.
function sendData({ reliable, text, topic }) {
  const field = (number, bytes) => [(number << 3) | 2, bytes.length, ...bytes];
  const bytes = (string) => [...new TextEncoder().encode(string)];
  const packet = field(2, [...field(2, bytes(text)), ...field(4, bytes(topic))]);
  channels[reliable ? "reliable" : "lossy"].send(new Uint8Array(packet));
}

function hangUp() {
  send("m.call.hangup", { reason: "user_hangup" });
  pc.close();
}

// Takes what came, and returns what is to be sent.
async function exchange({ incoming }) {
  incoming.forEach(take);
  return outbox.splice(0);
}

async function stats() {
  const inbound = [];
  const outbound = [];
  for (const entry of (await pc?.getStats())?.values() ?? [])
    if (entry.type === "inbound-rtp")
      inbound.push({
        kind: entry.kind,
        packets_received: entry.packetsReceived,
        frames_received: entry.framesReceived ?? 0,
        frames_decoded: entry.framesDecoded ?? 0,
        samples_received: entry.totalSamplesReceived ?? 0,
        samples_concealed: entry.concealedSamples ?? 0,
        audio_energy: entry.totalAudioEnergy ?? 0,
      });
    else if (entry.type === "outbound-rtp")
      outbound.push({ kind: entry.kind, packets_sent: entry.packetsSent, frames_encoded: entry.framesEncoded ?? 0 });
  const connection = pc?.connectionState ?? "none";
  return { caller, connection, ended: ended ?? null, streams: theirStreams, data, errors, inbound, outbound };
}

window.antiphon = { start, exchange, stats, publishLater, setMuted, sendData, hangUp };
