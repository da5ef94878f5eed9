//! What goes beyond lk-jwt-service, requirement by requirement, and the tests that hold it. A test that is
//! renamed is renamed here too, or this one fails.

use std::{fs, path::Path};

const REQUIREMENTS: [(&str, &str, &[&str]); 32] = [
    (
        "W1",
        "a stranger's server name leads to no private address",
        &[
            "addresses_written_out_are_refused",
            "names_that_lead_inside_are_refused",
            "srv_records_that_lead_inside_are_refused",
            "the_wildcard_and_the_development_lists_open_nothing_for_names_of_strangers",
            "servers_named_by_the_operator_may_be_inside",
            "redirects_are_not_followed_with_a_token_in_hand",
            "delegation_is_one_hop_then_srv_or_the_default_port",
            "a_homeserver_with_nothing_but_userinfo_on_loopback_works",
            "another_origin_gets_the_call_without_the_token",
        ],
    ),
    (
        "W2",
        "limits for addresses, homeservers, requests and connections",
        &[
            "two_thousand_at_once_are_answered_unless_one_address_sends_them_all",
            "what_a_stranger_says_about_its_address_is_not_believed",
            "a_hanging_homeserver_does_not_take_the_places_of_others",
            "requests_beyond_the_limit_are_told_to_come_back",
            "one_address_holds_so_many_connections_unless_it_is_a_proxy",
            "connections_beyond_the_bound_wait_their_turn",
        ],
    ),
    (
        "W3",
        "bodies, headers and silence are bounded",
        &[
            "bodies_beyond_the_limit_are_too_large",
            "a_body_that_does_not_arrive_is_not_waited_for",
            "a_client_that_never_finishes_its_headers_is_hung_up_on",
            "a_client_that_says_nothing_is_hung_up_on",
            "webhooks_must_be_signed_whole_and_new",
            "a_whole_object_in_an_unfinished_body_is_not_acted_on",
            "who_is_answered_before_their_body_came_is_told_that_the_connection_ends",
        ],
    ),
    (
        "W4",
        "whose users get tokens, and what restricted ones may do",
        &[
            "servers_beyond_the_list_get_nothing_and_are_not_asked",
            "restricted_users_can_be_made_listeners",
            "restricted_users_get_the_same_token_but_no_room",
        ],
    ),
    ("W5", "tokens live as long as the operator says", &["tokens_live_as_long_as_the_operator_says"]),
    (
        "W6",
        "no secret is logged",
        &[
            "a_deployment_on_loopback_admits_a_user_and_logs_no_secret",
            "a_refused_command_is_not_quoted",
            "settings_are_checked_and_printed_without_secrets",
            "a_stranger_cannot_fill_the_log_with_a_name",
        ],
    ),
    (
        "W7",
        "webhooks are refused plainly, and count once",
        &[
            "webhooks_must_be_signed_whole_and_new",
            "a_webhook_played_back_has_no_effect",
            "a_shutdown_finishes_what_is_being_sent_and_leaves_the_rest_to_the_next",
        ],
    ),
    (
        "W8",
        "a legacy identity is one device's",
        &[
            "a_device_that_could_be_read_as_another_users_is_refused",
            "a_legacy_identity_names_one_device_only",
        ],
    ),
    (
        "W9",
        "a delay id stays in its place",
        &[
            "a_delay_id_cannot_leave_its_place",
            "any_delay_id_is_one_segment",
            "refusals_come_in_the_order_that_clients_know",
        ],
    ),
    (
        "W10",
        "the SFU's certificate is always checked",
        &[
            "the_sfus_certificate_is_always_checked",
            "a_certificate_nobody_vouches_for_is_refused_before_any_request",
        ],
    ),
    (
        "W11",
        "server names in upper or lower case are the same",
        &[
            "the_full_access_list_is_split_and_the_star_stands_alone",
            "what_the_operator_has_written_goes_before_discovery",
            "a_list_says_whose_users_get_tokens_at_all",
        ],
    ),
    (
        "W12",
        "a reconnect is no leave",
        &[
            "the_end_of_another_connection_is_no_leave",
            "a_connection_that_nobody_took_over_is_a_leave_after_two_looks",
            "the_leave_of_a_connection_that_was_not_told_of_is_looked_into",
            "connections_may_be_told_of_the_wrong_way_round",
        ],
    ),
    (
        "W13",
        "a leave before the join",
        &["before_a_join_a_deliberate_leave_sends_and_a_failed_connect_is_silent"],
    ),
    (
        "W14",
        "discovery that fails ends no job",
        &[
            "what_was_found_is_used_on_when_discovery_fails",
            "many_who_look_for_one_homeserver_ask_it_once",
            "a_document_is_asked_for_again_a_minute_after_trouble",
            "in_trouble_a_server_is_where_it_was_before",
        ],
    ),
    (
        "W15",
        "restarts have time to fail and recover",
        &[
            "a_join_restarts_at_once_and_then_in_time",
            "a_failed_restart_recovers_before_the_deadline",
            "a_restart_is_tried_until_a_little_beyond_the_deadline_and_a_later_leave_is_still_sent",
            "a_hint_beyond_the_deadline_ends_the_restarts",
            "a_restart_that_hangs_is_made_again_before_the_event_fires",
        ],
    ),
    (
        "W16",
        "delayed events as MSC4140 has them now",
        &[
            "answers_mean_what_the_table_says",
            "stable_paths_are_used_only_when_announced",
            "the_stable_paths_are_used_where_they_are_announced_and_really_there",
            "an_access_token_goes_to_its_homeserver_with_delayed_event_calls_only",
        ],
    ),
    ("W17", "delays and jobs are bounded", &["bounds_hold", "tiny_delays_do_not_hammer_the_homeserver"]),
    (
        "W18",
        "the registry waits for nothing",
        &[
            "a_request_is_answered_after_its_job_is_written",
            "a_store_that_is_out_of_order_fails_no_request_and_gets_everything_later",
            "no_promised_job_is_lost_wherever_the_process_dies",
        ],
    ),
    (
        "W19",
        "restored jobs go on where they were",
        &[
            "a_restored_job_uses_what_is_left_of_its_time",
            "a_leave_during_the_services_restart_is_noticed",
            "a_job_whose_event_has_fired_is_cleared_away_at_the_start",
            "entries_that_are_no_job_are_purged_and_the_later_of_two_counts",
            "a_service_that_dies_goes_on_where_it_was",
            "an_sfu_that_is_down_after_the_services_restart_ends_no_call",
            "a_leave_that_is_told_after_the_services_restart_is_sent_if_nobody_is_there",
        ],
    ),
    (
        "W20",
        "several replicas",
        &[
            "of_two_replicas_one_acts",
            "a_lease_ends_with_its_time",
            "a_webhook_at_either_replica_leads_to_one_leave",
            "the_newest_delegation_counts_at_whichever_replica_it_is",
            "four_commands_are_enough",
            "a_short_delay_outlives_the_replica_that_restarted_it",
            "the_jobs_of_a_replica_that_stops_are_taken_over_at_once",
            "two_processes_of_one_name_are_told_so",
        ],
    ),
    (
        "W21",
        "jobs survive without Redis",
        &[
            "every_acknowledged_change_is_there_after_a_kill",
            "jobs_are_kept_in_one_place",
            "a_start_on_a_full_disk_keeps_what_is_there_until_there_is_room",
        ],
    ),
    ("W22", "one miss is none", &["sanity_checks_need_two_misses"]),
    (
        "W23",
        "looks at the SFU are few",
        &[
            "looks_end_with_a_webhook_that_tells_more",
            "looks_into_one_room_meet",
            "several_participants_of_a_room_take_one_call",
            "an_sfu_without_lists_is_asked_for_each",
            "an_empty_list_must_be_borne_out",
            "a_room_is_asked_about_all_its_participants_at_once",
        ],
    ),
    (
        "W24",
        "other specifications' objects may grow",
        &["objects_of_other_specifications_may_have_new_members", "other_specifications_objects_may_grow"],
    ),
    (
        "W25",
        "hashes over canonical JSON",
        &["aliases_match_the_published_vectors", "identities_match_the_published_vectors"],
    ),
    (
        "W26",
        "lookups share connections and discovery",
        &[
            "lookups_at_one_server_share_a_connection",
            "a_document_is_remembered_as_long_as_it_allows",
            "a_dead_way_to_the_homeserver_costs_seconds_and_no_token",
        ],
    ),
    (
        "W27",
        "calls of the SFU end, and a failed connect is tried again",
        &[
            "an_sfu_that_is_down_or_silent_is_an_error_in_bounded_time",
            "only_a_failed_connect_is_tried_again",
            "a_dead_way_to_the_sfu_costs_seconds_and_no_room",
        ],
    ),
    (
        "W28",
        "an orderly end",
        &[
            "requests_in_progress_are_answered_before_it_stops",
            "a_shutdown_finishes_what_is_being_sent_and_leaves_the_rest_to_the_next",
        ],
    ),
    (
        "W29",
        "health and readiness",
        &[
            "the_health_check_answers_without_a_body",
            "it_is_ready_between_restoring_and_stopping",
            "a_store_that_does_not_answer_is_told",
            "an_sfu_that_lets_us_in_is_ready_and_others_are_not",
            "it_is_not_ready_before_its_store_could_be_read",
            "it_is_not_ready_and_the_log_is_not_flooded",
        ],
    ),
    (
        "W30",
        "metrics",
        &[
            "operators_see_what_happens_on_a_listener_of_their_own",
            "what_happened_is_told_in_prometheus_text",
            "lateness_counts_from_when_it_was_due_to_when_it_was_done",
        ],
    ),
    (
        "W31",
        "start-up errors say what to do",
        &[
            "start_up_errors_name_the_variable_and_the_remedy",
            "failures_come_in_the_order_of_the_reference",
            "the_health_check_tells_a_running_service_from_none",
            "keys_come_from_files_too",
            "what_can_be_no_servers_name_is_warned_of",
            "a_variable_in_another_encoding_is_no_unset_one",
        ],
    ),
    (
        "W32",
        "TLS and Unix sockets",
        &[
            "a_unix_socket_serves_and_goes_with_the_service",
            "tls_is_served_and_a_renewed_certificate_is_read_again",
        ],
    ),
];

#[test]
fn every_requirement_has_its_tests() {
    let mut sources = String::new();
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["src", "tests"] {
        read(&package.join(folder), &mut sources);
    }
    for (number, (name, what, tests)) in REQUIREMENTS.iter().enumerate() {
        assert_eq!(*name, format!("W{}", number + 1));
        for test in *tests {
            assert!(sources.contains(&format!("fn {test}(")), "{name}, {what}: there is no test {test}");
        }
    }
}

fn read(folder: &Path, all: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, all);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}
