//! What the SFU says.

use livekit_protocol::{self as proto, signal_request as request, signal_response as response};

use super::{
    ending::{End, left_by, lost},
    link::{Exchange, Link, description},
    peers::Side,
    requests::qualities,
    session::Session,
};
use crate::transport::{
    ConnectionQuality, TrackSid, TransportError, TransportEvent, rtc::sections::incoming_tracks,
};

/// Sections that an SFU asks for on one connection at most; more than any call has tracks.
const MOST_SECTIONS: usize = 2000;

impl Session {
    /// A message of the SFU.
    pub(super) async fn hear(&mut self, link: &mut Link, message: response::Message) -> Result<(), End> {
        match message {
            // In v1 only we offer.
            response::Message::Offer(_) if link.peers.is_single() => Ok(()),
            response::Message::Offer(offer) => self.answer_offer(link, offer).await,
            response::Message::Answer(answer) => self.take_answer(link, answer).await,
            response::Message::Trickle(trickle) => {
                let side = match trickle.target() {
                    proto::SignalTarget::Publisher => Side::Publisher,
                    proto::SignalTarget::Subscriber => Side::Subscriber,
                };
                link.peers.side(side).add_candidate(&trickle.candidate_init).await;
                Ok(())
            }
            response::Message::Update(update) => {
                for info in update.participants {
                    let events = self.roster.update(info.into());
                    self.emit_all(events).await?;
                }
                Ok(())
            }
            response::Message::TrackPublished(published) => {
                let info = published.track.unwrap_or_default();
                match link.publications.grant(&published.cid, info.sid.clone()) {
                    Some(track) => self.granted(link, track, info).await,
                    None => Ok(()),
                }
            }
            response::Message::RequestResponse(response) => self.take_response(link, response).await,
            response::Message::TrackUnpublished(ended) => {
                let Some(track) = link.publications.track_of(&ended.track_sid) else { return Ok(()) };
                let error = TransportError::TrackRefused("the SFU ended it".to_owned());
                self.give_up(link, track, error).await
            }
            response::Message::Leave(leave) => Err(left_by(&leave)),
            response::Message::SubscriptionResponse(refused) => {
                tracing::warn!(sid = refused.track_sid, error = ?refused.err(), "a track cannot be received");
                Ok(())
            }
            response::Message::SpeakersChanged(changed) => match self.roster.speakers(&changed.speakers) {
                Some(speakers) => self.emit(TransportEvent::Speakers(speakers)).await,
                None => Ok(()),
            },
            response::Message::ConnectionQuality(update) => {
                for update in update.updates {
                    if let Some(identity) = self.roster.identity(&update.participant_sid).cloned() {
                        let quality = match update.quality() {
                            proto::ConnectionQuality::Poor => ConnectionQuality::Poor,
                            proto::ConnectionQuality::Good => ConnectionQuality::Good,
                            proto::ConnectionQuality::Excellent => ConnectionQuality::Excellent,
                            proto::ConnectionQuality::Lost => ConnectionQuality::Lost,
                        };
                        self.emit(TransportEvent::Quality { identity, quality }).await?;
                    }
                }
                Ok(())
            }
            response::Message::StreamStateUpdate(update) => {
                for stream in update.stream_states {
                    let paused = stream.state() == proto::StreamState::Paused;
                    let sid = TrackSid(stream.track_sid);
                    if self.roster.has_track(&sid) {
                        self.emit(TransportEvent::StreamPaused { sid, paused }).await?;
                    }
                }
                Ok(())
            }
            response::Message::MediaSectionsRequirement(wanted) => self.add_sections(link, &wanted).await,
            response::Message::SubscribedQualityUpdate(update) => self.take_qualities(link, &update).await,
            // Pings and tokens are the signalling client's business; the rest concerns what this transport does not
            // do.
            _ => Ok(()),
        }
    }

    async fn answer_offer(&self, link: &mut Link, offer: proto::SessionDescription) -> Result<(), End> {
        link.expected = incoming_tracks(&offer.sdp, &offer.mid_to_track_id);
        let sdp = link.peers.subscriber().answer_offer(&offer.sdp).await.map_err(lost)?;
        let answer = description("answer", sdp, offer.id);
        link.exchange = Exchange { offer: Some(offer), answer: Some(answer.clone()) };
        link.send(request::Message::Answer(answer));
        link.expect_media(Side::Subscriber);
        Ok(())
    }

    async fn take_answer(&self, link: &mut Link, answer: proto::SessionDescription) -> Result<(), End> {
        if !link.publications.expects_answer(answer.id) {
            tracing::debug!(id = answer.id, "an answer to no present offer");
            return Ok(());
        }
        if link.peers.is_single() {
            link.expected = incoming_tracks(&answer.sdp, &answer.mid_to_track_id);
        }
        link.peers.publisher.take_answer(&answer.sdp).await.map_err(lost)?;
        link.expect_media(Side::Publisher);
        if link.peers.is_single() {
            link.exchange.answer = Some(answer);
        }
        for track in link.publications.answered() {
            self.attach(link, track).await?;
        }
        Ok(())
    }

    /// In v1 the SFU asks for room for more tracks; without numbers, only for an offer.
    async fn add_sections(
        &self,
        link: &mut Link,
        wanted: &proto::MediaSectionsRequirement,
    ) -> Result<(), End> {
        for (audio, count) in [(true, wanted.num_audios), (false, wanted.num_videos)] {
            for _ in 0..count {
                if link.sections >= MOST_SECTIONS {
                    return Err(End::Lost("the SFU asks for too many media sections".to_owned()));
                }
                link.sections += 1;
                link.peers.publisher.add_receiving_section(audio).await.map_err(lost)?;
            }
        }
        link.publications.require_offer();
        Ok(())
    }

    async fn take_response(&self, link: &mut Link, response: proto::RequestResponse) -> Result<(), End> {
        use proto::request_response::{Reason, Request};
        let reason = response.reason();
        if let Some(Request::AddTrack(asked)) = &response.request
            && !matches!(reason, Reason::Ok | Reason::Queued)
            && let Some(track) = link.publications.refuse(&asked.cid)
        {
            let text = format!("{} {}", reason.as_str_name(), response.message);
            let error = TransportError::TrackRefused(text.trim().chars().take(300).collect());
            self.give_up(link, track, error).await?;
        }
        Ok(())
    }

    /// Which layers of a local track somebody receives.
    async fn take_qualities(&self, link: &Link, update: &proto::SubscribedQualityUpdate) -> Result<(), End> {
        let Some(track) = link.publications.track_of(&update.track_sid) else { return Ok(()) };
        let Some(asked) = link.asked.get(&track) else { return Ok(()) };
        // We publish one codec, so the first entry is ours; servers before codec lists send qualities alone.
        #[allow(deprecated, reason = "the form of servers without codec lists")]
        let wanted =
            update.subscribed_codecs.first().map_or(&update.subscribed_qualities, |codec| &codec.qualities);
        let layers: Vec<_> = qualities(asked.local.spec.layers.len())
            .iter()
            .map(|quality| wanted.iter().any(|wanted| wanted.enabled && wanted.quality() == *quality))
            .collect();
        self.emit(TransportEvent::LayersWanted { track, layers }).await
    }
}
