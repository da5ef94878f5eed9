// Runs in the page, around unmodified livekit-client. Keys are set the way Element Call sets them:
// one key per participant identity, raw bytes as HKDF input, a ring of 256.
const { BaseKeyProvider, Room, RoomEvent, Track } = window.LivekitClient;

class ParticipantKeys extends BaseKeyProvider {
  constructor() {
    super({ ratchetWindowSize: 10, keyringSize: 256, sharedKey: false });
  }

  async set(identity, base64, index) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const key = await crypto.subtle.importKey("raw", bytes, "HKDF", false, ["deriveBits", "deriveKey"]);
    this.onSetEncryptionKey(key, identity, index);
  }
}

let room, keys, tone;
const errors = {};
const sinks = new Map();

async function connect({ url, token, e2ee, publish, simulcast }) {
  const options = { adaptiveStream: false, dynacast: false };
  if (e2ee) {
    keys = new ParticipantKeys();
    options.e2ee = { keyProvider: keys, worker: new Worker("/livekit-client.e2ee.worker.js") };
  }
  room = new Room(options);
  room.on(RoomEvent.EncryptionError, (error, participant) => {
    const of = (errors[participant?.identity ?? ""] ??= { count: 0, last: "" });
    of.count += 1;
    of.last = String(error?.message ?? error);
  });
  // Without an unmuted sink Chromium neither decodes video at full rate nor measures the energy of audio.
  room.on(RoomEvent.TrackSubscribed, (track) => {
    const element = track.attach();
    sinks.set(track.sid, element);
    document.body.append(element);
  });
  room.on(RoomEvent.TrackUnsubscribed, (track) => {
    track.detach().forEach((element) => element.remove());
    sinks.delete(track.sid);
  });
  if (e2ee) {
    await room.setE2EEEnabled(true);
    for (const { identity, key, index } of e2ee.keys) await keys.set(identity, key, index);
  }
  const started = performance.now();
  await room.connect(url, token);
  const connected = performance.now();
  if (publish) await publishBoth(simulcast);
  return {
    identity: room.localParticipant.identity,
    connect_ms: Math.round(connected - started),
    publish_ms: Math.round(performance.now() - connected),
  };
}

async function publishBoth(simulcast) {
  // A tone and not the fake microphone: it never pauses, so that the receiver's energy must grow.
  const audio = new AudioContext();
  const oscillator = audio.createOscillator();
  const destination = audio.createMediaStreamDestination();
  oscillator.connect(destination);
  oscillator.start();
  tone = { audio, oscillator };
  const camera = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 360, frameRate: 15 } });
  await room.localParticipant.publishTrack(camera.getVideoTracks()[0], {
    source: Track.Source.Camera,
    videoCodec: "vp8",
    simulcast: Boolean(simulcast),
  });
  await room.localParticipant.publishTrack(destination.stream.getAudioTracks()[0], {
    source: Track.Source.Microphone,
    dtx: false,
    red: false,
  });
}

async function rtp(report, direction) {
  const found = [];
  for (const entry of (await report)?.values() ?? []) if (entry.type === direction) found.push(entry);
  const sum = (field) => found.reduce((total, entry) => total + (entry[field] ?? 0), 0);
  return sum;
}

async function stats() {
  const remote = [];
  for (const participant of room.remoteParticipants.values()) {
    for (const publication of participant.trackPublications.values()) {
      const sum = await rtp(publication.track?.receiver?.getStats(), "inbound-rtp");
      remote.push({
        identity: participant.identity,
        kind: publication.kind,
        muted: publication.isMuted,
        encrypted: publication.isEncrypted,
        packets_received: sum("packetsReceived"),
        frames_received: sum("framesReceived"),
        frames_decoded: sum("framesDecoded"),
        samples_received: sum("totalSamplesReceived"),
        samples_concealed: sum("concealedSamples"),
        audio_energy: sum("totalAudioEnergy"),
      });
    }
  }
  const own = [];
  for (const publication of room.localParticipant.trackPublications.values()) {
    const sum = await rtp(publication.track?.sender?.getStats(), "outbound-rtp");
    own.push({ kind: publication.kind, packets_sent: sum("packetsSent"), frames_encoded: sum("framesEncoded") });
  }
  return {
    state: room.state,
    participants: [...room.remoteParticipants.keys()],
    encryption_errors: errors,
    remote,
    own,
  };
}

async function setMuted({ kind, muted }) {
  const publication = [...room.localParticipant.trackPublications.values()].find((of) => of.kind === kind);
  await (muted ? publication.mute() : publication.unmute());
}

async function leave() {
  await room.disconnect();
  tone?.oscillator.stop();
  await tone?.audio.close();
}

const setKey = ({ identity, key, index }) => keys.set(identity, key, index);

window.antiphon = { connect, stats, setKey, setMuted, leave };
