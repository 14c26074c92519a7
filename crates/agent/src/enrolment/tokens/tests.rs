use super::*;

const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

fn now() -> SystemTime {
    from_ms(1_800_000_000_000)
}

fn terms(node: Option<&str>, pattern: Option<&str>) -> Result<TokenTerms, TermsError> {
    TokenTerms::new(CLUSTER, node, pattern, None, 1, DEFAULT_LIFE)
}

fn token(node: &str, pattern: &str) -> TokenRecord {
    let node = (!node.is_empty()).then_some(node);
    let pattern = (!pattern.is_empty()).then_some(pattern);
    terms(node, pattern).unwrap().record("admin", now())
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn terms_out_of_bounds_are_refused_by_name() {
    assert!(matches!(terms(Some("a"), Some("*")), Err(TermsError::NodeAndPattern)));
    assert!(matches!(terms(Some("A"), None), Err(TermsError::Node(_))));
    assert!(matches!(terms(None, Some("A*")), Err(TermsError::Pattern(_))));
    let with = |network, uses, life| TokenTerms::new(CLUSTER, None, None, network, uses, life);
    assert!(matches!(with(Some("10.0.0.1/8"), 1, MIN_LIFE), Err(TermsError::Network(_))));
    assert!(matches!(with(None, 0, MIN_LIFE), Err(TermsError::Uses)));
    assert!(matches!(with(None, MAX_USES + 1, MIN_LIFE), Err(TermsError::Uses)));
    let second = Duration::from_secs(1);
    assert!(matches!(with(None, 1, MIN_LIFE - second), Err(TermsError::Life)));
    assert!(matches!(with(None, 1, MAX_LIFE + second), Err(TermsError::Life)));
    assert!(with(Some("10.0.0.0/8"), MAX_USES, MAX_LIFE).is_ok());
}

#[test]
fn a_token_bound_to_a_node_makes_that_node_and_may_replace_it() {
    let token = token("cp1", "");
    for wanted in ["", "cp1"] {
        let claim = claim(&token, wanted).unwrap();
        assert_eq!((claim.name.as_str(), claim.may_replace, claim.cluster), ("cp1", true, CLUSTER));
    }
    assert_eq!(claim(&token, "cp2"), Err(TokenRefused::Node));
}

#[test]
fn a_token_without_a_name_makes_only_what_the_node_asks_for_and_the_pattern_allows() {
    assert!(!claim(&token("", "cp-*"), "cp-1").unwrap().may_replace);
    assert!(!claim(&token("", ""), "anything").unwrap().may_replace);
    assert_eq!(claim(&token("", "cp-*"), "worker-1"), Err(TokenRefused::Node));
    assert_eq!(claim(&token("", ""), ""), Err(TokenRefused::NodeMissing));
    assert_eq!(claim(&token("", ""), "../admin/root"), Err(TokenRefused::NodeForm));
    assert_eq!(claim(&token("", ""), "*"), Err(TokenRefused::NodeForm));
}

#[test]
fn a_token_is_good_until_its_end_and_within_its_network() {
    let mut token = token("cp1", "");
    token.cidr = "10.0.0.0/8".to_owned();
    let end = now() + DEFAULT_LIFE;
    assert_eq!(judge(&token, address("10.1.1.1"), end - Duration::from_millis(1)), Ok(()));
    assert_eq!(judge(&token, address("10.1.1.1"), end), Err(TokenRefused::Expired));
    assert_eq!(judge(&token, address("192.0.2.1"), now()), Err(TokenRefused::Address));
}

#[test]
fn a_use_is_counted_and_listed_and_the_list_is_bounded() {
    let mut token = token("", "");
    token.uses_left = 100;
    for n in 0..100_u8 {
        assert_eq!(judge(&token, address("10.1.1.1"), now()), Ok(()));
        token = consume(&token, format!("node {n}"), &[n; 32], now());
    }
    assert_eq!(judge(&token, address("10.1.1.1"), now()), Err(TokenRefused::UsedUp));
    assert_eq!(token.used.len(), USES_KEPT);
    assert_eq!(token.used.last().unwrap().identity, "node 99");
}

#[test]
fn a_damaged_record_makes_nobody() {
    let mut both = token("cp1", "");
    both.pattern = "*".to_owned();
    assert_eq!(claim(&both, "cp1"), Err(TokenRefused::Damaged));
    let mut cluster = token("cp1", "");
    cluster.cluster.pop();
    assert_eq!(claim(&cluster, "cp1"), Err(TokenRefused::Damaged));
}
