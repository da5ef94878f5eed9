//! Lets the RTCP through that concerns us: it ends inside the engine otherwise.

use std::collections::VecDeque;

use rtc::{
    interceptor::{Attribute, AttributedPacket, Interceptor, Packet, StreamInfo, TaggedPacket},
    rtcp::{
        self,
        payload_feedbacks::{
            full_intra_request::FullIntraRequest, picture_loss_indication::PictureLossIndication,
        },
        sender_report::SenderReport,
    },
    sansio::Protocol,
    shared::error::Error as RtcError,
};

/// Passes on key frame requests (to local tracks) and sender reports (to remote tracks), one by one: the engine routes a
/// compound packet by the first SSRC in it, and an SFU asks for several tracks at once.
#[derive(Default)]
pub(super) struct Feedback {
    reads: VecDeque<TaggedPacket>,
    writes: VecDeque<TaggedPacket>,
}

impl Protocol<TaggedPacket, TaggedPacket, ()> for Feedback {
    type Rout = TaggedPacket;
    type Wout = TaggedPacket;
    type Eout = ();
    type Error = RtcError;
    type Time = std::time::Instant;

    fn handle_read(&mut self, message: TaggedPacket) -> Result<(), RtcError> {
        let Packet::Rtcp(packets) = &message.message.packet else {
            self.reads.push_back(message);
            return Ok(());
        };
        for packet in packets.iter().filter_map(|packet| for_a_track(&**packet)) {
            self.reads.push_back(TaggedPacket {
                now: message.now,
                transport: message.transport,
                message: AttributedPacket::new(Packet::Rtcp(vec![packet]))
                    .with(Attribute::DeliverToApplication),
            });
        }
        Ok(())
    }

    fn poll_read(&mut self) -> Option<TaggedPacket> {
        self.reads.pop_front()
    }

    fn handle_write(&mut self, message: TaggedPacket) -> Result<(), RtcError> {
        self.writes.push_back(message);
        Ok(())
    }

    fn poll_write(&mut self) -> Option<TaggedPacket> {
        self.writes.pop_front()
    }
}

/// The packet as a track is to get it, or `None` if no track is to get it.
fn for_a_track(packet: &dyn rtcp::Packet) -> Option<Box<dyn rtcp::Packet>> {
    let any = packet.as_any();
    if any.is::<PictureLossIndication>() || any.is::<FullIntraRequest>() {
        return Some(packet.cloned());
    }
    // Without its report blocks, which would route it to our own tracks.
    let report = any.downcast_ref::<SenderReport>()?;
    Some(Box::new(SenderReport { reports: Vec::new(), ..report.clone() }))
}

impl Interceptor for Feedback {
    fn bind_local_stream(&mut self, _: &StreamInfo) {}
    fn unbind_local_stream(&mut self, _: &StreamInfo) {}
    fn bind_remote_stream(&mut self, _: &StreamInfo) {}
    fn unbind_remote_stream(&mut self, _: &StreamInfo) {}
}
