// One matrix-js-sdk client in a MatrixRTC call, without media. Commands and answers are lines of JSON: see lines.mjs.
import { drive, until } from "./lines.mjs";
import { load } from "./modules.mjs";

// The SDK and its wasm write to the console, which is where the answers go.
for (const level of ["log", "info", "debug", "trace", "warn", "error"])
  console[level] = (...words) => level !== "trace" && process.stderr.write(`${level}: ${words.join(" ").slice(0, 2000)}\n`);

const sdk = await load("matrix-js-sdk");
const keys = new Map();
const errors = [];
let client, session, roomId;

const commands = {
  connect: async (args) => {
    roomId = args.room;
    client = sdk.createClient({
      baseUrl: args.homeserver,
      userId: args.user_id,
      deviceId: args.device_id,
      accessToken: args.access_token,
    });
    await client.initRustCrypto({ useIndexedDB: false });
    await client.startClient();
    await until(() => client.isInitialSyncComplete(), 15_000, "the first sync");
    if (client.getRoom(roomId)?.getMyMembership() !== "join") await client.joinRoom(roomId, { viaServers: args.via });
    await until(
      async () =>
        client.getRoom(roomId)?.getMyMembership() === "join" && (await client.getCrypto().isEncryptionEnabledInRoom(roomId)),
      15_000,
      "seeing the encrypted room",
    );
    return { version: sdk.version ?? "" };
  },
  join: ({ service_url, sticky, delay_ms }) => {
    const [userId, deviceId] = [client.getUserId(), client.getDeviceId()];
    session = client.matrixRTC.getRoomSession(client.getRoom(roomId));
    session.on("encryption_key_changed", (key, index, member, backendIdentity) => {
      const name = `${backendIdentity}#${index}`;
      keys.delete(name); // so that it becomes the last one
      keys.set(name, {
        user_id: member.userId,
        device_id: member.deviceId,
        backend_identity: backendIdentity,
        index,
        key: Buffer.from(key).toString("base64"),
      });
    });
    session.on("membership_manager_error", (error) => errors.push(String(error)));
    const transport = { type: "livekit", livekit_service_url: service_url, ...(!sticky && { livekit_alias: roomId }) };
    session.joinRTCSession(
      { userId, deviceId, memberId: sticky ? crypto.randomUUID() : `${userId}:${deviceId}` },
      [transport],
      sticky ? transport : undefined,
      {
        manageMediaKeys: true,
        unstableSendStickyEvents: sticky,
        delayedLeaveEventDelayMs: delay_ms,
        delayedLeaveEventRestartMs: delay_ms / 4,
      },
    );
  },
  state: () => ({
    members: (session?.memberships ?? []).map((member) => ({
      user_id: member.userId,
      device_id: member.deviceId,
      backend_identity: member.rtcBackendIdentity,
    })),
    keys: [...keys.values()],
    syncing: client.getSyncState() === "SYNCING",
    errors,
  }),
  forget_keys: () => (keys.clear(), null),
  leave: () => session.leaveRoomSession(3000).then(() => null),
};

drive(commands, async () => client?.stopClient());
