// Element Call from npm, stand-alone: how it is served, joined and watched from outside.
import { readFileSync } from "node:fs";
import { extname } from "node:path";
import { folder } from "./modules.mjs";
import { serve } from "./serve.mjs";

// Playwright polls on animation frames unless told otherwise, and a page behind another one has none.
const polled = { polling: 100 };

export function serveElementCall(homeserver, serverName) {
  const dist = folder("@element-hq/element-call-embedded", "dist");
  const config = {
    ...JSON.parse(readFileSync(`${dist}/config.json`)),
    matrix_rtc_mode: "compatibility",
    default_server_config: { "m.homeserver": { base_url: homeserver, server_name: serverName } },
  };
  // Assets are ./assets and routes are /room/…: without a base they would be looked for below /room/.
  const html = readFileSync(`${dist}/index.html`, "utf8").replace("<head>", '<head><base href="/">');
  return serve(dist, (_request, response, path) => {
    const isConfig = path === "/config.json";
    if (!isConfig && extname(path)) return false;
    response.setHeader("content-type", isConfig ? "application/json" : "text/html");
    response.end(isConfig ? JSON.stringify(config) : html);
    return true;
  });
}

// Returns how long each stage took, in milliseconds.
export async function joinElementCall(page, base, { user, password, room, via, encrypted }) {
  await page.addInitScript(watchPeerConnections);
  const started = Date.now();
  await logIn(page, base, user, password);
  // It goes home after the login and only then is its store settled.
  await page.waitForURL((url) => !url.pathname.startsWith("/login"));
  const loggedIn = Date.now();
  const query = new URLSearchParams({ roomId: room, viaServers: via, perParticipantE2EE: String(encrypted) });
  await page.goto(`${base}/room/#?${query}`);
  await page.reload(); // a changed fragment alone does not navigate
  const button = page.getByTestId("lobby_joinCall");
  await button.waitFor();
  const lobby = Date.now();
  await button.click();
  return { login_ms: loggedIn - started, lobby_ms: lobby - loggedIn, click_ms: Date.now() - lobby };
}

// On a busy machine the form may be filled before the page listens to it: then it is filled again.
async function logIn(page, base, user, password) {
  for (let tries = 3; ; tries--) {
    await page.goto(`${base}/login`);
    await page.locator('input[type="text"]').first().fill(user);
    await page.locator('input[type="password"]').fill(password);
    await page.locator('button[type="submit"]').first().click();
    try {
      return await page.waitForFunction(() => localStorage.getItem("matrix-auth-store"), undefined, {
        ...polled,
        timeout: 15_000,
      });
    } catch (error) {
      if (tries === 1) throw error;
    }
  }
}

export async function leaveElementCall(page) {
  await page.getByTestId("incall_leave").click();
  // One that was never used stays "new".
  const open = ["connecting", "connected", "disconnected"];
  await page.waitForFunction(
    (open) => !window.antiphonConnections.some((connection) => open.includes(connection.connectionState)),
    open,
    polled,
  );
}

// Runs in the page before anything else: remembers every peer connection, so that its statistics can be read.
function watchPeerConnections() {
  const connections = (window.antiphonConnections = []);
  const streams = (window.antiphonStreams = new Map());
  window.RTCPeerConnection = class extends window.RTCPeerConnection {
    constructor(...settings) {
      super(...settings);
      connections.push(this);
      this.addEventListener("track", ({ track, streams: of }) => streams.set(track.id, of[0]?.id ?? ""));
    }
  };
}

export function elementCallStats(page) {
  return page.evaluate(async () => {
    const inbound = [];
    const outbound = [];
    for (const connection of window.antiphonConnections ?? []) {
      if (connection.connectionState === "closed") continue;
      for (const entry of (await connection.getStats()).values()) {
        if (entry.type === "inbound-rtp")
          inbound.push({
            kind: entry.kind,
            stream: window.antiphonStreams.get(entry.trackIdentifier) ?? "",
            packets_received: entry.packetsReceived ?? 0,
            frames_received: entry.framesReceived ?? 0,
            frames_decoded: entry.framesDecoded ?? 0,
            samples_received: entry.totalSamplesReceived ?? 0,
            samples_concealed: entry.concealedSamples ?? 0,
            audio_energy: entry.totalAudioEnergy ?? 0,
          });
        if (entry.type === "outbound-rtp")
          outbound.push({
            kind: entry.kind,
            packets_sent: entry.packetsSent ?? 0,
            frames_encoded: entry.framesEncoded ?? 0,
          });
      }
    }
    return {
      connections: (window.antiphonConnections ?? []).map((connection) => connection.connectionState),
      tiles: document.querySelectorAll('[data-testid="videoTile"]').length,
      url: location.href,
      inbound,
      outbound,
    };
  });
}
